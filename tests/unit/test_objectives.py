"""Expected gradients by enumeration over the sampling distribution, in float64, and what ``build`` refuses."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_tropd import objectives
from nemo_tropd.batch import TokenScores
from nemo_tropd.objectives.entropy_opd import quantile

pytestmark = pytest.mark.random

V, K = 9, 4
SAMPLED = [name for name, kind in objectives.OBJECTIVES.items() if not kind.needs_distributions]  # else: test_exact


class State:
    """One state: student logits that carry gradient, teacher, reference; every token of the vocabulary enumerated."""

    def __init__(self, seed: int, k: int = K, teacher: Tensor | None = None) -> None:
        print(f"seed {seed}")
        g = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(V, generator=g).double().requires_grad_(True)
        noise = 2.5 * torch.randn(V, generator=g).double()
        self.log_t = (noise if teacher is None else teacher).log_softmax(-1)
        self.log_r = torch.randn(V, generator=g).double().log_softmax(-1)
        self.k = k

    @property
    def log_s(self) -> Tensor:
        return self.logits.log_softmax(-1)

    @property
    def s(self) -> Tensor:
        return self.log_s.exp().detach()

    @property
    def t(self) -> Tensor:
        return self.log_t.exp()

    @property
    def rho(self) -> Tensor:
        return (self.log_t - self.log_s).exp().detach()

    @property
    def in_top(self) -> Tensor:
        return torch.zeros(V).double().index_fill_(0, self.log_t.topk(self.k).indices, 1.0)

    def scores(self, uniforms: float = 0.0, guided: bool = False, **extra: Any) -> TokenScores:
        """All V samples x of this state, as V tokens."""
        top = self.log_t.topk(self.k)
        log_s = self.log_s
        return TokenScores(
            log_s, log_s[top.indices].expand(V, self.k), self.log_t, top.values.expand(V, self.k),
            torch.full((V,), guided), torch.full((V,), uniforms, dtype=torch.float64),
            student_entropy=torch.full((V,), float(-(self.s * log_s).sum())).double(),
            teacher_entropy=torch.full((V,), float(-(self.t * self.log_t).sum())).double(),
            reference_log_probs=self.log_r, **extra,
        )  # fmt: skip

    def gradient(self, value: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(value, self.logits)
        return grad

    def expected(self, name: str, weights: Tensor | None = None, **params: Any) -> Tensor:
        """Gradient of E over x (by default x ~ pi_S, frozen) and, for a Bernoulli gate, over M."""
        objective = objectives.build(name, **params)
        weights = self.s if weights is None else weights
        if getattr(objective, "gate", None) != "bernoulli":
            return self.gradient((weights * objective(self.scores())[0]).sum())
        # The draw is below min(rho, 1) with that probability: u = 0 always trusts, u just below 1 only rho >= 1.
        p = self.rho.clamp(max=1)
        trusted, outlier = objective(self.scores(0.0))[0], objective(self.scores(1 - 1e-12))[0]
        return self.gradient((weights * (p * trusted + (1 - p) * outlier)).sum())

    def policy_gradient(self, reward: Tensor) -> Tensor:
        return self.gradient(-(self.s * reward.detach() * self.log_s).sum())


@pytest.fixture
def state() -> State:
    return State(random.randrange(10**6))


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_k1_is_the_gradient_of_the_reverse_kl(state: State) -> None:
    log_s = state.log_s
    reverse = state.gradient((log_s.exp() * (log_s - state.log_t)).sum())
    same(state.expected("opd"), reverse)
    gap = (state.log_s - state.log_t).detach()
    same(reverse, state.s * (gap - (state.s * gap).sum()))
    same(state.policy_gradient(state.rho.log() - 1.234), reverse)  # a constant baseline changes nothing
    # Differentiating the K1 estimate itself never sees the teacher.
    same(state.gradient((state.s * (state.log_s - state.log_t)).sum()), torch.zeros(V).double())


def test_the_gate_trusts_one_minus_total_variation(state: State) -> None:
    draws = torch.rand(20000, generator=torch.Generator().manual_seed(3)).double()
    objective, p = objectives.build("tropd"), state.rho.clamp(max=1)
    trusted = torch.stack([objective(state.scores(float(u)))[1]["trust"] for u in draws[:2000]]).mean(0)
    assert (trusted - p).abs().max() < 0.06
    distance = 0.5 * (state.s - state.t).abs().sum()
    same((state.s * p).sum(), 1 - distance)
    same((state.s * objectives.build("tropd", gate="soft")(state.scores())[1]["trust"]).sum(), 1 - distance)


@pytest.mark.parametrize("name", ["tropd", "fkl_outlier"])
@pytest.mark.parametrize("gate", ["bernoulli", "soft"])
def test_tropd_enumerated(state: State, name: str, gate: str) -> None:
    mass, distance = (state.in_top * state.t).sum(), 0.5 * (state.s - state.t).abs().sum()
    want = state.policy_gradient(state.rho.clamp(max=1) * state.rho.log())
    want = want + distance * (mass * state.s - state.t * state.in_top)
    same(state.expected(name, gate=gate), want)


def test_raw_forward_kl(state: State) -> None:
    mass = (state.in_top * state.t).sum()
    same(state.expected("fkl"), mass * state.s - state.t * state.in_top)
    q = state.in_top * state.t / mass
    renormalised = (torch.xlogy(q, q) - q * state.log_s.detach()).sum()
    value = objectives.build("fkl")(state.scores())[0].detach()
    same(value, (mass * renormalised + mass * mass.log()).expand(V))
    whole = State(7, k=V)
    same(whole.expected("fkl"), whole.s - whole.t)
    same(objectives.build("fkl")(whole.scores())[0][0], (whole.t * (whole.log_t - whole.log_s)).sum())


def test_raw_forward_kl_may_be_negative_and_keeps_its_gradient() -> None:
    state = State(1, k=2, teacher=torch.zeros(V).double())
    state.logits.data = 3 * state.in_top  # the student has more mass on the top k than the teacher
    assert float(objectives.build("fkl")(state.scores())[0][0]) < 0
    assert state.expected("fkl").abs().max() > 0.01


def test_ghost_tail_is_the_coarsened_kl(state: State) -> None:
    rest = 1 - state.in_top
    t, s = (rest * state.t).sum(), (rest * state.log_s.exp()).sum()
    want = (state.in_top * state.t * (state.log_t - state.log_s)).sum() + t * (t.log() - s.log())
    got = objectives.build("fkl", tail="ghost")(state.scores())[0][0]
    assert float(got) >= 0
    same(got, want)
    same(state.gradient(got), state.gradient(want))
    whole = State(2, k=V)  # nothing is missing: the tail is 0, not NaN
    got = objectives.build("fkl", tail="ghost")(whole.scores())[0][0]
    torch.testing.assert_close(got, objectives.build("fkl")(whole.scores())[0][0], rtol=1e-9, atol=1e-9)
    assert whole.gradient(got).isfinite().all()


@pytest.mark.parametrize("alpha", [0.2, 0.7, 1.0])
def test_topd_moves_towards_a_proximal_teacher(state: State, alpha: float) -> None:
    proximal = (alpha * state.t + (1 - alpha) * state.s).log()
    log_s = state.log_s
    same(state.expected("topd", alpha=alpha), state.gradient((log_s.exp() * (log_s - proximal)).sum()))
    reward = objectives.build("topd", alpha=alpha)(state.scores())[1]["reward"]
    if alpha == 1.0:
        same(reward, state.rho.log())
    else:
        assert float(reward.min()) >= math.log(1 - alpha)
    bound = objectives.build("topd", alpha=alpha, baseline="global").bind(torch.tensor([0.5, 1.5]))
    same(state.gradient((state.s * bound(state.scores())[0]).sum()), state.expected("topd", alpha=alpha))


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_jsd_detached_is_exact_and_the_literal_form_counts_twice(beta: float) -> None:
    state = State(random.randrange(10**6), k=V)

    def first_and_whole() -> tuple[Tensor, Tensor]:
        log_s = state.log_s
        mixture = (beta * state.t + (1 - beta) * log_s.exp()).log()
        first = beta * (state.t * (state.log_t - mixture)).sum()
        return first, first + (1 - beta) * (log_s.exp() * (log_s - mixture)).sum()

    exact = state.gradient(first_and_whole()[1])
    same(state.expected("jsd", beta=beta, teacher_term="detached"), exact)
    same(state.expected("jsd", beta=beta), exact + state.gradient(first_and_whole()[0]))


def test_gopd_goes_beyond_the_teacher(state: State) -> None:
    target = (1.25 * state.log_t - 0.25 * state.log_r).log_softmax(-1)
    log_s = state.log_s
    same(state.expected("gopd"), state.gradient((log_s.exp() * (log_s - target)).sum()))
    same(state.expected("gopd", **{"lambda": 1.0}), state.expected("opd"))


def test_threshold_and_bernoulli_agree_where_rho_is_zero_or_at_least_one() -> None:
    state = State(5)
    state.logits.data = torch.tensor([0.0] * 5 + [-80.0] * 4).double()
    state.log_t = torch.tensor([0.0, 0.0, 0.0, -900.0, -900.0, -1.0, -1.0, -1.0, -1.0]).double().log_softmax(-1)
    rho = state.rho
    assert bool(((rho == 0) | (rho >= 1)).all()) and bool((rho == 0).any())
    same(state.expected("tropd", gate="threshold"), state.expected("tropd"))


def test_guidance_pulls_towards_the_teacher(state: State) -> None:
    for name, params in (("tropd", {}), ("opd", {"guidance_weight": 0.25}), ("tropd_aopd", {"guidance_weight": 0.25})):
        objective = objectives.build(name, **params)
        loss = objective(state.scores(guided=True))[0]
        weight = params.get("guidance_weight", 0.001)
        same(state.gradient((state.t * loss).sum()), weight * (state.s - state.t))


@pytest.mark.parametrize("name", SAMPLED)
def test_teacher_equals_student(name: str) -> None:
    state = State(random.randrange(10**6), k=V)
    state.log_t = state.log_s.detach()
    state.log_r = state.log_t
    objective = bound(objectives.build(name), state)
    # At u = 0 and just below 1 alike: rho is 1, so every draw trusts.
    for u in (0.0, 1 - 1e-12):
        loss, metrics = objective(state.scores(u))
        if name != "aopd":  # AOPD takes a tie for an outlier
            same(metrics["trust"], torch.ones(V).double())
        same(metrics["log_ratio"], torch.zeros(V).double())
        same(loss.detach(), torch.zeros(V).double())
        same(state.gradient((state.s * loss).sum()), torch.zeros(V).double())


@pytest.mark.parametrize("name", SAMPLED)
def test_gradient_flows_through_the_student_alone(name: str) -> None:
    """R, M, pi_T, thresholds and entropies are constants: no gradient reaches the tensors they are made of."""
    state = State(random.randrange(10**6))
    objective = bound(objectives.build(name), state)
    base = state.scores(0.5)
    fields = ("teacher_log_probs", "teacher_top_k_log_probs", "student_entropy", "teacher_entropy", "uniforms",
              "reference_log_probs")  # fmt: skip
    leaves = {f: getattr(base, f).detach().clone().requires_grad_(True) for f in fields}
    leaves |= {"behavior_log_probs": (base.student_log_probs.detach() - 0.1).requires_grad_(True)}
    loss, metrics = objective(replace(base, **leaves))
    assert all(not v.requires_grad for v in metrics.values())
    grads = torch.autograd.grad(loss.sum(), [*leaves.values(), state.logits], allow_unused=True)
    assert all(g is None or bool((g == 0).all()) for g in grads[:-1])
    assert grads[-1] is not None


def bound(objective: objectives.Objective, state: State) -> objectives.Objective:
    objective = objective.at_step(0)
    return objective.bind(objective.statistic(state.scores())) if objective.needs_first_pass else objective


@pytest.mark.parametrize("name", SAMPLED)
def test_importance_weights_are_truncated_and_detached(name: str, state: State) -> None:
    behavior = state.log_s.detach() - torch.linspace(-2, 2, V).double()
    behavior[4] = math.nan  # a token that the student did not sample
    plain, weighted = (bound(objectives.build(name, **p), state) for p in ({}, {"importance_cap": 1.5}))
    want = (state.log_s.detach() - behavior).exp().clamp(max=1.5)
    want[4] = 1.0
    loss, metrics = weighted(state.scores(0.5, behavior_log_probs=behavior))
    same(metrics["importance_weight"], want)
    expected = want * plain(state.scores(0.5))[0]
    same(loss.detach(), expected.detach())
    same(state.gradient(loss.sum()), state.gradient(expected.sum()))
    with pytest.raises(ValueError, match="behavior_log_probs"):
        weighted(state.scores(0.5))


def test_eopd_clips_the_ratio() -> None:
    state = State(3)
    plain, objective = (objectives.build("eopd", alpha=0.0, old_policy=old) for old in ("student", "behavior"))
    # pi_S is twice the behavior: where R > 0 the clip holds, and the gradient stops.
    behavior = state.log_s.detach() - math.log(2)
    for scores in (state.scores(), state.scores(behavior_log_probs=behavior)):  # one update a batch: the ratio is 1
        same(state.gradient((state.s * plain(scores)[0]).sum()), state.expected("opd"))
    with pytest.raises(ValueError, match=r"old_policy 'behavior' needs TokenScores\.behavior_log_probs"):
        objective(state.scores())
    with pytest.raises(ValueError, match="correct for the same"):
        objectives.build("eopd", old_policy="behavior", importance_cap=2.0)
    loss, _ = objective(state.scores(behavior_log_probs=behavior))
    reward = state.rho.log()
    same(loss.detach(), -torch.where(reward > 0, 1.2 * reward, 2.0 * reward))
    (grad,) = torch.autograd.grad(loss[reward > 0].sum(), state.logits)
    same(grad, torch.zeros(V).double())


def test_extreme_ratios_stay_finite() -> None:
    state = State(4)
    state.logits.data[0], state.log_t = -2000.0, torch.tensor([0.0] + [-3000.0] * 8).double().log_softmax(-1)
    for name in SAMPLED:
        if name == "reopold_2stage":
            continue
        loss, metrics = bound(objectives.build(name), state)(state.scores(0.5))
        if name != "eopd":  # exp(l - l) only
            assert loss.isfinite().all(), name
        assert metrics["trust"].isfinite().all(), name
        assert state.gradient(loss.sum()).isfinite().all(), name


def test_two_stages() -> None:
    state, objective = State(6), objectives.build("reopold_2stage", switch_step=10)
    first, second = objective.at_step(9), objective.at_step(10)
    same(first.statistic(state.scores()), state.rho.log())
    same(second.statistic(state.scores()), state.scores().student_entropy)
    assert first.needs_first_pass and not first.bind(state.rho.log()).needs_first_pass
    kept = state.rho.log() >= math.log(0.3) / 0.7
    doubled = first.bind(state.rho.log(), 2 * V)(state.scores())[0]  # half of all loss tokens are the teacher's
    same(doubled, 2 * first.bind(state.rho.log())(state.scores())[0])
    loss = first.bind(state.rho.log())(state.scores())[0]
    want = torch.where(kept, -state.rho.log() * state.log_s, 0.0) * V / kept.sum()
    same(loss, want)  # a mean over N tokens is then the sum over the mask divided by the mask
    with pytest.raises(ValueError, match="not bound"):
        first(state.scores())
    with pytest.raises(ValueError, match="at_step"):
        objective.bind(torch.zeros(3))
    with pytest.raises(ValueError, match="needs no first pass"):
        objectives.build("opd").bind(torch.zeros(3))


def tokens(*pairs: tuple[float, float]) -> TokenScores:
    """Tokens of given (teacher, student) log-probabilities; two candidates each, on which the models differ."""
    teacher, student = torch.tensor(pairs).double().unbind(1)
    top = torch.tensor([[-0.5, -1.5]]).double().expand(len(pairs), 2)
    nothing = torch.zeros(len(pairs)).double()
    return TokenScores(student, top.flip(1), teacher, top, nothing.bool(), nothing)


def test_ties_fall_as_the_equations_say() -> None:
    """R = 0 to the bit while the distributions differ: trusted by the threshold, an outlier to AOPD."""
    scores = tokens((-1.25, -1.25), (-1.0, -1.25), (-1.5, -1.25))
    kl = math.exp(-0.5) - math.exp(-1.5)  # sum of pi_T (log pi_T - log pi_S), the gaps being 1 and -1
    assert objectives.build("tropd", gate="threshold")(scores)[1]["trust"].tolist() == [1, 1, 0]
    loss, metrics = objectives.build("aopd")(scores)
    same(loss, torch.tensor([kl, 0.25 * 1.25, kl], dtype=torch.float64))
    assert metrics["trust"].tolist() == [0, 1, 0]


def test_outliers_are_clipped_or_masked_at_tau() -> None:
    scores = tokens((-6.0, -1.0), (-4.0, -1.0), (-2.0, -1.0), (-0.5, -1.0))  # R = -5, -3, -1, 0.5
    clipped, masked = (objectives.build(name, tau=-3.0)(scores)[0] for name in ("clip_outlier", "mask_outlier"))
    assert clipped.tolist() == [-3, -3, -1, 0.5] and masked.tolist() == [0, 0, -1, 0.5]


@pytest.mark.parametrize("count", [1, 2, 24, 101])
def test_the_quantile_is_torchs(count: int) -> None:
    values = torch.randn(count).double()
    for q in (0.0, 0.2, 0.77, 1.0):
        torch.testing.assert_close(quantile(values, q), float(torch.quantile(values, q)), rtol=1e-12, atol=1e-12)
    assert quantile(values[:0], 0.5) == math.inf


def test_reopold_floors() -> None:
    floors = {floor: objectives.build("reopold", floor=floor).c for floor in ("bound", "logit")}
    assert abs(floors["bound"] + 1.72) < 0.005 and abs(floors["logit"] + 0.85) < 0.005


@pytest.mark.parametrize(
    ("name", "params", "text"),
    [
        ("trodp", {}, "unknown objective 'trodp'; known: opd, fkl, jsd"),
        ("opd", {"gate": "soft"}, "'opd' has no parameter gate; it knows guidance_weight, importance_cap"),
        ("reopold_2stage", {"factor": 1.0}, "no parameter factor"),
        ("tropd", {"gate": "hard"}, "parameter 'gate' is 'hard'; choose one of bernoulli, threshold, soft"),
        ("tropd", {"outlier": "drop"}, "choose one of fkl, mask, clip"),
        ("fkl", {"tail": "renormalise"}, "choose one of none, ghost"),
        ("jsd", {"beta": 1.0}, "parameter 'beta' is 1.0"),
        ("topd", {"alpha": 0.0}, "parameter 'alpha' is 0.0"),
        ("topd", {"alpha": "a lot"}, "give a finite number"),
        ("gopd", {"lambda": math.nan}, "give a finite number"),
        ("tropd", {"importance_cap": 0.0}, "give a number above 0"),
    ],
)
def test_build_refuses(name: str, params: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        objectives.build(name, **params)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_parameter_refuses_what_is_not_a_value_of_its_kind(name: str) -> None:
    for parameter in objectives.parameters(name):
        for bad in (math.nan, math.inf, True, "no such", [1], {"a": 1}, 1e39):
            with pytest.raises(objectives.ParameterError) as caught:
                objectives.build(name, **{parameter: bad})
            assert caught.value.parameter == parameter.rstrip("_"), (parameter, bad)
        if parameter in ("guidance_weight", "importance_cap"):
            objectives.build(name, **{parameter: None})


def test_needs_are_declared_and_checked(state: State) -> None:
    needs = {"entropy_opd": "student_entropy", "eopd": "teacher_entropy", "gopd": "reference_log_probs"}
    for name, field in needs.items():
        objective = bound(objectives.build(name), state)
        with pytest.raises(ValueError, match=f"needs TokenScores.{field}"):
            objective(replace(state.scores(), **{field: None}))
    assert objectives.build("aopd").denominator == "sequences"
    assert objectives.build("tropd").guidance_weight == 0.001
