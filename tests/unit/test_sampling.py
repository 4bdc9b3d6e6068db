"""What is sampled is what is trained on: temperature, top-k and top-p in the head, by enumeration and by equations."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from nemo_tropd import objectives
from nemo_tropd.batch import Rollout, Sampling, TokenBatch
from nemo_tropd.config import ModelConfig
from nemo_tropd.gpt.build import head_weight
from nemo_tropd.gpt.forward import pipeline_forward
from nemo_tropd.loss.divergence import exact_divergences
from nemo_tropd.loss.head import score_tokens, teacher_scores
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.model import tropd_model
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.teacher.admission import Admission
from tests.oracles.micro_batch import VARIANTS, make, objective_and_loss
from tests.oracles.sampled_states import check_states
from tests.oracles.sampling import kept, renormalised
from tests.tiny_models import make_tiny
from tests.unit.test_head import SCALE, relative, run

pytestmark = pytest.mark.random


def some_sampling(draw: random.Random, vocabulary: int) -> Sampling:
    """Cut by both, by top-k alone or not at all."""
    top_k = draw.choice([0, 1, draw.randint(2, vocabulary), draw.randint(2, vocabulary), vocabulary + 3])
    return Sampling(draw.uniform(0.3, 1.5), draw.choice([1.0, draw.uniform(0.1, 0.99)]) if top_k else 1.0, top_k)


@pytest.fixture
def draw() -> random.Random:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    return random.Random(seed)


def test_expected_gradients_are_those_of_the_distribution_that_was_sampled(draw: random.Random) -> None:
    for sampling in [Sampling(0.6, 0.95, 20), *(some_sampling(draw, 29) for _ in range(30))]:
        for failure in check_states(draw.randrange(10**6), sampling, torch.float64, 1e-6):
            pytest.fail(f"{sampling}: {failure}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradients_of_every_objective(variant: str, draw: random.Random) -> None:
    """Half of the tokens are the teacher's favourites, which top-k and top-p may have left out."""
    for sampling in (Sampling(0.6, 0.95, 20), Sampling(1.3, 0.5, 9), Sampling(0.4), some_sampling(draw, 91)):
        mb = make(draw.randrange(10**6), sampling=sampling)
        hidden, weight = (t.clone().requires_grad_(True) for t in (mb.hidden, mb.weight))
        objective, losses = objective_and_loss(variant, mb.world(hidden, weight))
        (losses.sum() * SCALE).backward()
        for chunk in (None, 4):
            got, grad_h, grad_w = run(mb, objective, chunk_tokens=chunk)
            assert relative(got.loss, losses.sum() * SCALE, losses.detach().abs().sum() * SCALE) < 1e-5, sampling
            assert relative(grad_h, hidden.grad) < 1e-5 and relative(grad_w, weight.grad) < 1e-5, sampling


def test_nothing_cut_at_temperature_1_changes_no_bit(draw: random.Random) -> None:
    mb = make(draw.randrange(10**6))
    for variant in ("tropd", "entropy_opd"):
        objective = objective_and_loss(variant, mb.world(mb.hidden, mb.weight))[0]
        plain = run(mb, objective, torch.bfloat16)
        every = run(replace(mb, sampling=Sampling(1.0, 1.0, mb.vocab_size)), objective, torch.float64)
        assert relative(every[1], run(mb, objective, torch.float64)[1]) < 1e-6  # all kept: cut in name alone
        again = run(replace(mb, sampling=Sampling(1.0)), objective, torch.bfloat16)
        assert torch.equal(again[1], plain[1]) and torch.equal(again[2], plain[2])


def test_scores_without_gradient_are_those_of_the_loss(draw: random.Random) -> None:
    mb = make(draw.randrange(10**6), sampling=Sampling(0.7, 0.9, 12))
    layout = HeadLayout(mb.vocab_size, chunk_tokens=5, sampling=mb.sampling)
    seen = score_tokens(mb.hidden.float(), mb.weight.float(), mb.tokens, mb.teacher_scores(), layout, entropy=True)
    world = mb.world(mb.hidden, mb.weight)
    assert relative(seen.student_log_probs, world.likelihood) < 1e-5
    assert relative(seen.student_top_k_log_probs, world.student.gather(1, mb.teacher_scores().top_k_ids)) < 1e-5
    assert seen.student_entropy is not None
    assert relative(seen.student_entropy, -(world.student.exp() * world.student).sum(-1)) < 1e-5
    # The cut counts: some student tokens gain, the teacher's do not.
    gain, guided = seen.student_log_probs.double() - world.at(world.student), mb.tokens.guided
    assert gain[~guided].max() > 1e-3 and gain[guided].abs().max() < 1e-5


def test_a_token_that_was_cut_off_counts_as_kept(draw: random.Random) -> None:
    """Engine and trainer may differ about the last place."""
    mb = make(draw.randrange(10**6), sampling=Sampling(1.0, 0.8, 5))
    logits = mb.world(mb.hidden, mb.weight).logits
    outside = torch.tensor([next(v for v in range(91) if v not in kept(z, mb.sampling)) for z in logits.tolist()])
    mb = replace(mb, tokens=replace(mb.tokens, token_ids=outside, guided=torch.zeros_like(mb.tokens.guided)))
    layout = HeadLayout(mb.vocab_size, sampling=mb.sampling)
    seen = score_tokens(mb.hidden.float(), mb.weight.float(), mb.tokens, mb.teacher_scores(), layout)
    assert seen.student_log_probs.isfinite().all() and (seen.student_log_probs < 0).all()
    assert relative(seen.student_log_probs, mb.world(mb.hidden, mb.weight).likelihood) < 1e-5


def test_equal_models_are_equal_at_any_temperature(draw: random.Random) -> None:
    mb = make(draw.randrange(10**6))
    hidden, weight, rows, ids = mb.hidden.float(), mb.weight.float(), mb.tokens.rows, mb.tokens.token_ids
    layout = HeadLayout(mb.vocab_size, sampling=Sampling(draw.uniform(0.3, 1.5)))
    teacher = teacher_scores(hidden, weight, rows, ids, 91, layout)
    seen = score_tokens(hidden, weight, mb.tokens, teacher, layout)
    assert torch.equal(seen.student_log_probs, teacher.log_probs)
    # The teacher is never cut, whatever the layout says; divergences compare models, not samples.
    cut = replace(layout, sampling=replace(layout.sampling, top_k=3, top_p=0.5))
    assert torch.equal(teacher_scores(hidden, weight, rows, ids, 91, cut).log_probs, teacher.log_probs)
    other = mb.teacher_hidden.float(), mb.teacher_weight.float()
    exact = [exact_divergences(hidden, weight, *other, rows, of) for of in (cut, HeadLayout(mb.vocab_size))]
    assert all(torch.equal(exact[0][name], exact[1][name]) for name in exact[1])


def test_an_empty_micro_batch_gives_zeros(draw: random.Random) -> None:
    mb = make(draw.randrange(10**6), fill=0.0, sampling=Sampling(0.6, 0.95, 20))
    out, grad_h, grad_w = run(mb, objectives.build("tropd"))
    assert out.loss.item() == 0 and not grad_h.any() and not grad_w.any()


@pytest.mark.parametrize("bad", [Sampling(0.0), Sampling(1.0, 0.9, 0)])
def test_a_distribution_without_a_gradient_is_refused(bad: Sampling) -> None:
    with pytest.raises(ValueError, match="a temperature above 0, and with top_p below 1 a top_k"):
        HeadLayout(91, sampling=bad)


def test_a_row_of_nan_is_carried(draw: random.Random) -> None:
    mb = make(draw.randrange(10**6), sampling=Sampling(0.6, 0.95, 20))
    mb.hidden.view(-1, mb.hidden.size(-1))[mb.tokens.rows[2]] = float("nan")
    out, grad_h, _ = run(mb, objectives.build("tropd"), carry_bad=True)
    assert out.bad == ("the student's logits", 2) and grad_h.isnan().all()


@pytest.mark.parametrize("objective", ["gopd", "entropy_opd"])
def test_a_run_scores_all_its_models_as_it_samples(
    objective: str, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student, teacher and reference through the model of a run, and the FP8 teacher's admission."""
    cfg, cut, admitted = ModelConfig(), Sampling(0.6, 0.95, 20), {}
    cfg.data.path, cfg.teacher.path = "unused", str(make_tiny(tmp_path / "teacher", seed=2))
    cfg.rollout.temperature, cfg.rollout.top_p, cfg.rollout.top_k = 0.6, 0.95, 20
    source = tropd_model.StudentSource(make_tiny(tmp_path / "student", seed=1), "32", 131)
    parts: dict[str, Any] = {"topology": topology, "objective": objectives.build(objective), "student": source}
    model = tropd_model.MegatronTrOPDModel(OmegaConf.structured(cfg), None, **parts)
    ids = [5, 9, 17, 33, 44, 70, 100, 3, 8, 61]
    rollouts = [Rollout(ids[:2], ids[2:4], ids[4:], [-1.0] * 6, 0, 0, 0, True)]
    rollouts += [Rollout(ids[3:], [], ids[:7], [-2.0] * 7, 0, 1, 1, True)]
    batch = TokenBatch.pack(rollouts, pad_id=0, seed=1, step=1)
    tokens = batch.loss_tokens()

    def logits(of: Any) -> Tensor:
        (hidden,) = pipeline_forward(of, [batch], topology)
        return (hidden.flatten(0, 1)[tokens.rows] @ head_weight(of).t())[:, :131].detach().double()

    teacher, student = logits(model.teacher.model), logits(model.student)
    (scores,), (reference,) = model.score([batch]), model._reference_scores([batch])
    (seen,) = model._student_scores([batch], [scores], [reference], entropy=True)
    assert scores is not None and seen is not None
    uncut = torch.ones_like(tokens.guided)
    assert relative(scores.log_probs, renormalised(teacher, tokens.token_ids, uncut, cut)) < 1e-5
    assert relative(seen.student_log_probs, renormalised(student, tokens.token_ids, tokens.guided, cut)) < 1e-5
    if reference is not None:  # the student as it was before training
        assert relative(reference, renormalised(student, tokens.token_ids, uncut, cut)) < 1e-5
    _, sums = model.get_loss_and_metrics([batch], [scores], step=1, loss_tokens=len(tokens), sequences=2)
    gap = (seen.student_log_probs - tokens.behavior_log_probs)[~tokens.guided].abs().sum()
    assert relative(torch.tensor(sums.sums["mismatch"]), gap) < 1e-5

    def admit(*args: Any, **options: Any) -> Any:
        admitted.update(options)
        return model.teacher, Admission("none", 1, 0.0, 0.0, 0.0)

    cfg.teacher.fp8 = "tensorwise"
    monkeypatch.setattr(tropd_model, "admit", admit)
    tropd_model.MegatronTrOPDModel(OmegaConf.structured(cfg), None, **parts, calibration=[batch])
    assert admitted["temperature"] == 0.6


def test_the_plan_names_it() -> None:
    assert str(Sampling()) == "softmax(logits)"
    assert str(Sampling(0.6, 0.95, 20)) == "softmax(logits / 0.6), top-k 20, then top-p 0.95"
