"""The chunked head on one rank against float64 torch on the full vocabulary; what it refuses; what changes nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_tropd import objectives
from nemo_tropd.batch import LossTokens, Rollout, TeacherScores, TokenBatch
from nemo_tropd.loss.divergence import exact_divergences
from nemo_tropd.loss.head import HeadLoss, LossOptions, head_loss, score_tokens, sequence_mean_weights, teacher_scores
from nemo_tropd.loss.inputs import CHUNK_BYTES, HeadLayout, chunk_size
from nemo_tropd.parallel.vocab import NonFiniteLogits
from tests.oracles.micro_batch import VARIANTS, MicroBatch, make, objective_and_loss

pytestmark = pytest.mark.random

SCALE = 1 / 37


@pytest.fixture
def seed() -> int:
    """Fresh inputs on every run; pytest shows the number when a test fails."""
    value = random.randrange(10**6)
    print(f"seed {value}")
    return value


def relative(got: Tensor, want: Tensor, size: Tensor | None = None) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / (want.norm() if size is None else size).clamp(min=1e-12))


def run(
    mb: MicroBatch,
    objective: Any,
    dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    scale: float = SCALE,
    **options: Any,
) -> tuple[HeadLoss, Any, Any]:
    """(result, hidden gradient, weight gradient)."""
    h, w = (t.to(dtype).clone().requires_grad_(True) for t in (mb.hidden, mb.weight))
    reference = mb.reference.gather(1, mb.tokens.token_ids[:, None])[:, 0].float()
    out = head_loss(
        h, w, mb.tokens, mb.teacher_scores(), objective,
        HeadLayout(mb.vocab_size, chunk_tokens=chunk_tokens, sampling=mb.sampling),
        scale=scale, options=LossOptions(**({"reference_log_probs": reference} | options)),
    )  # fmt: skip
    out.loss.backward()
    return out, h.grad, w.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradients(variant: str, dtype: torch.dtype, seed: int) -> None:
    mb = make(seed)
    hidden, weight = (t.clone().requires_grad_(True) for t in (mb.hidden, mb.weight))
    objective, losses = objective_and_loss(variant, mb.world(hidden, weight))
    want = losses.sum() * SCALE
    want.backward()
    for chunk in (None, 1, 4, 64):
        got, grad_h, grad_w = run(mb, objective, dtype, chunk_tokens=chunk)
        assert got.loss.dtype == torch.float32
        assert relative(got.loss, want, losses.detach().abs().sum() * SCALE) < 1e-5
        assert relative(grad_h, hidden.grad) < 1e-5
        assert relative(grad_w, weight.grad) < 1e-5
        assert grad_w[mb.vocab_size :].abs().max() == 0


def test_bf16_accumulates_the_weight_gradient_in_fp32(seed: int) -> None:
    """Many chunks of bf16 products lose no more than one product does."""
    mb = make(seed, batch=4, length=64, fill=0.9)
    mb = replace(mb, hidden=mb.hidden.bfloat16().double(), weight=mb.weight.bfloat16().double())
    full = mb.weight.clone().requires_grad_(True)
    objective = objectives.build("fkl")
    (mb.world(mb.hidden, full).forward_kl().sum() * SCALE).backward()
    errors = [relative(run(mb, objective, torch.bfloat16, chunk_tokens=chunk)[2], full.grad) for chunk in (4, 256)]
    assert max(errors) < 2e-2
    assert errors[0] < 1.5 * errors[1] + 1e-4


def test_outer_gradient_scales_both_and_is_used_once(seed: int) -> None:
    mb, objective = make(seed), objectives.build("tropd")
    _, grad_h, grad_w = run(mb, objective)
    h, w = (t.float().requires_grad_(True) for t in (mb.hidden, mb.weight))
    out = head_loss(h, w, mb.tokens, mb.teacher_scores(), objective, HeadLayout(mb.vocab_size), scale=SCALE)
    (out.loss * -3).backward(retain_graph=True)
    assert relative(h.grad, -3 * grad_h) < 1e-6
    assert relative(w.grad, -3 * grad_w) < 1e-6
    with pytest.raises(RuntimeError, match="already used"):
        out.loss.backward()


def test_only_what_needs_a_gradient_gets_one(seed: int) -> None:
    mb, objective = make(seed), objectives.build("tropd")
    want, grad_h, _ = run(mb, objective)
    h, w = mb.hidden.float().requires_grad_(True), mb.weight.float()
    args = (mb.tokens, mb.teacher_scores(), objective, HeadLayout(mb.vocab_size))
    frozen = head_loss(h, w, *args, scale=SCALE)
    frozen.loss.backward()
    assert w.grad is None and torch.equal(h.grad, grad_h)
    with torch.no_grad():
        value = head_loss(h, w.requires_grad_(True), *args, scale=SCALE)
    assert not value.loss.requires_grad and torch.equal(value.loss, want.loss)


def test_permuting_tokens_and_cutting_chunks_change_only_rounding(seed: int) -> None:
    mb = make(seed, batch=5, length=40)
    order = torch.randperm(len(mb.tokens), generator=torch.Generator().manual_seed(seed))
    moved = LossTokens(**{name: value[order] for name, value in vars(mb.tokens).items()})
    shuffled = replace(mb, tokens=moved, reference=mb.reference[order])
    objective = objectives.build("tropd")
    out, grad_h, grad_w = run(mb, objective)
    for other, rows, chunk in (shuffled, order, None), (mb, slice(None), 7), (shuffled, order, 13):
        again, again_h, again_w = run(other, objective, chunk_tokens=chunk)
        # The draw of a token never changes, so neither does its gate.
        assert torch.equal(again.per_token["trust"], out.per_token["trust"][rows])
        assert relative(again_h, grad_h) < 1e-6 and relative(again_w, grad_w) < 1e-6
        assert set(again.metrics) == set(out.metrics)
        for name, value in again.metrics.items():
            torch.testing.assert_close(value, out.metrics[name], rtol=1e-5, atol=1e-5)


def test_metrics_are_sums_over_student_tokens(seed: int) -> None:
    mb = make(seed)
    world = mb.world(mb.hidden, mb.weight)
    student = ~mb.tokens.guided
    out, _, _ = run(mb, objectives.build("tropd"), chunk_tokens=3)
    trust, losses = world.trust(), objective_and_loss("tropd", world)[1]
    want = {
        "trust": trust[student].sum(),
        "log_ratio": world.ratio[student].sum(),
        "forward_kl": world.forward_kl()[student].sum(),
        "outlier_loss": ((1 - trust) * world.forward_kl())[student].sum(),
        "loss": losses[student].sum(),
        "guided_loss": losses[~student].sum(),
        "tokens": student.sum(),
        "guided_tokens": (~student).sum(),
    }
    assert set(out.metrics) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(out.metrics[name], value.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.minima["log_ratio"], world.ratio[student].min(), rtol=1e-4, atol=1e-5)


def test_sequence_means(seed: int) -> None:
    """aopd's denominator: the mean over sequences of each one's mean, over micro-batches of unequal lengths."""
    batches = [make(seed + i, fill=f) for i, f in enumerate((0.9, 0.3))]
    total = sum(len(mb.tokens) for mb in batches)
    sequences = sum(int(mb.tokens.sequence.unique().numel()) for mb in batches)
    got, means = torch.zeros(()), []
    for mb in batches:
        weights = sequence_mean_weights(mb.tokens, total, sequences)
        got = got + run(mb, objectives.build("aopd"), token_weights=weights, scale=1 / total)[0].loss.detach()
        losses = objective_and_loss("aopd", mb.world(mb.hidden, mb.weight))[1]
        means += [losses[mb.tokens.sequence == s].mean() for s in mb.tokens.sequence.unique()]
    torch.testing.assert_close(got.double(), torch.stack(means).mean(), rtol=1e-5, atol=1e-6)


def test_first_pass_gives_what_the_objective_sees(seed: int) -> None:
    """A threshold from score_tokens over two micro-batches keeps exactly the tokens above it."""
    batches = [make(seed + i) for i in range(2)]
    objective = objectives.build("entropy_opd", quantile=0.77)
    assert objective.needs_first_pass and objective.needs_student_entropy
    seen = [
        score_tokens(
            mb.hidden.float(),
            mb.weight.float(),
            mb.tokens,
            mb.teacher_scores(),
            HeadLayout(mb.vocab_size),
            entropy=True,
        )
        for mb in batches
    ]
    statistics = torch.cat([objective.statistic(s) for s in seen])
    bound = objective.bind(statistics)
    for mb, scores in zip(batches, seen, strict=True):
        out, *_ = run(mb, bound)
        cut = torch.quantile(statistics.double(), 0.77)
        assert torch.equal(out.per_token["kept"], (scores.student_entropy > cut).float())
    with pytest.raises(ValueError, match="tau"):
        run(batches[0], objective)


def test_teacher_equals_student_gives_nothing_to_learn(seed: int) -> None:
    """Aligned labels, one softmax: R = 0 everywhere, M = 1, no loss, no gradient."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 91, (3, 9), generator=generator)
    rollouts = [Rollout(r[:3].tolist(), [], r[3:].tolist(), [-1.0] * 6, 0, i, i, True) for i, r in enumerate(ids)]
    batch = TokenBatch.pack(rollouts, pad_id=0, seed=seed, step=3)
    tokens = batch.loss_tokens()
    hidden, weight = torch.randn(3, 9, 16, generator=generator), torch.randn(96, 16, generator=generator)
    layout = HeadLayout(91)
    teacher = teacher_scores(hidden, weight, tokens.rows, tokens.token_ids, 91, layout, entropy=True)
    for name in ("opd", "fkl", "jsd", "clip_outlier", "mask_outlier", "tropd", "reopold", "aopd", "topd"):
        h = hidden.clone().requires_grad_(True)
        out = head_loss(h, weight, tokens, teacher, objectives.build(name), layout, scale=1 / len(tokens))
        out.loss.backward()
        assert abs(out.loss.item()) < 1e-5 and h.grad.abs().max() < 1e-5, name
        assert out.minima["log_ratio"].item() == 0 and out.metrics["log_ratio"].item() == 0


def test_exact_divergences(seed: int) -> None:
    mb = make(seed)
    got = exact_divergences(
        mb.hidden.float(), mb.weight.float(), mb.teacher_hidden.float(), mb.teacher_weight.float(), mb.tokens.rows,
        HeadLayout(mb.vocab_size, chunk_tokens=5),
    )  # fmt: skip
    world = mb.world(mb.hidden, mb.weight)
    s, t = world.student, world.teacher
    assert relative(got["reverse_kl"], (s.exp() * (s - t)).sum(-1)) < 1e-5
    assert relative(got["forward_kl"], (t.exp() * (t - s)).sum(-1)) < 1e-5
    assert relative(got["one_minus_tv"], 1 - 0.5 * (s.exp() - t.exp()).abs().sum(-1)) < 1e-5
    assert relative(got["student_entropy"], -(s.exp() * s).sum(-1)) < 1e-5
    assert relative(got["teacher_entropy"], -(t.exp() * t).sum(-1)) < 1e-5
    same = (s.argmax(-1) == t.argmax(-1)).float()
    assert torch.equal(got["top1_agreement"], same) and not same.all()


def test_chunks_keep_to_the_memory_bound() -> None:
    for dtype, bytes_per_logit in ((torch.float32, 4), (torch.bfloat16, 6)):
        hidden = torch.zeros(1, 1, 8, dtype=dtype)
        for tokens, columns in ((4096, 49152), (100, 151936), (7, 91)):
            size = chunk_size(tokens, columns, hidden, None)
            assert 1 <= size <= tokens and size * columns * bytes_per_logit <= CHUNK_BYTES["cpu"]
    assert chunk_size(10, 1 << 40, hidden, None) == 1  # one token is always computed
    assert chunk_size(0, 91, hidden, None) == 1


def test_hidden_states_need_not_be_contiguous(seed: int) -> None:
    """A model that works sequence-first hands over a transposed view."""
    mb, objective = make(seed), objectives.build("tropd")
    _, grad_h, grad_w = run(mb, objective)
    for batch in (mb.hidden, mb.hidden[:1]):
        first = batch.float().transpose(0, 1).contiguous().requires_grad_(True)
        tokens = mb.tokens
        keep = tokens.sequence < batch.size(0)
        tokens = LossTokens(**{name: value[keep] for name, value in vars(tokens).items()})
        teacher = TeacherScores(**{name: value[keep] for name, value in vars(mb.teacher_scores()).items()})
        w = mb.weight.float().requires_grad_(True)
        head_loss(first.transpose(0, 1), w, tokens, teacher, objective, HeadLayout(91), scale=SCALE).loss.backward()
        assert relative(first.grad.transpose(0, 1), grad_h[: batch.size(0)]) < 1e-6
    assert relative(w.grad, grad_w) > 1e-3  # the last run had one sequence only


def broken(mb: MicroBatch, what: str) -> dict[str, Any]:
    t, s, h, w = mb.tokens, mb.teacher_scores(), mb.hidden.float(), mb.weight.float()
    args: dict[str, Any] = {"hidden": h, "weight": w, "tokens": t, "teacher": s, "layout": HeadLayout(91), "scale": 1.0}

    def at(tensor: Tensor, value: int) -> Tensor:
        return tensor.clone().index_fill_(0, torch.tensor([2]), value)

    nan = h.clone()
    nan.view(-1, 16)[t.rows[2]] = float("nan")
    wide = torch.randint(0, 91, (len(t), 92))
    changes: dict[str, dict[str, Any]] = {
        "row outside": {"tokens": replace(t, rows=at(t.rows, 24))},
        "negative id": {"tokens": replace(t, token_ids=at(t.token_ids, -1))},
        "id in the padding": {"tokens": replace(t, token_ids=at(t.token_ids, 91))},
        "teacher id": {"teacher": replace(s, top_k_ids=at(s.top_k_ids, 95))},
        "k": {"teacher": TeacherScores(s.log_probs, wide.float(), wide)},
        "guided": {"tokens": replace(t, guided=t.guided[1:])},
        "hidden size": {"hidden": h[..., 1:]},
        "flat hidden": {"hidden": h.flatten(0, 1)},
        "dtype": {"hidden": h.bfloat16()},
        "vocabulary": {"layout": HeadLayout(97)},
        "chunk": {"layout": HeadLayout(91, chunk_tokens=0)},
        "weights": {"options": LossOptions(token_weights=torch.ones(3))},
        "main grad": {"weight": w.requires_grad_(True), "options": LossOptions(accumulate_main_grad=True)},
        "nan": {"hidden": nan},
    }
    return args | changes[what]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("row outside", r"rows\[2\] is 24, outside the 24 output positions"),
        ("negative id", r"token_ids\[2\] is -1, outside the vocabulary 0\.\.90"),
        ("id in the padding", r"token_ids\[2\] is 91"),
        ("teacher id", r"teacher\.top_k_ids\[2, 0\] is 95"),
        ("k", r"k is 92; give 1\.\.91"),
        ("guided", r"tokens\.guided has shape"),
        ("hidden size", r"give weight \[V_local, H\] of the same H"),
        ("flat hidden", r"give \[B, S, H\]"),
        ("dtype", r"hidden is torch\.bfloat16 but weight torch\.float32"),
        ("vocabulary", r"vocab_size is 97, but 1 rank\(s\) of 96 columns"),
        ("chunk", r"chunk_tokens is 0"),
        ("weights", r"token_weights has shape \(3,\)"),
        ("main grad", r"needs weight\.main_grad"),
        ("nan", r"student logits: row 2 has a NaN"),
    ],
)
def test_bad_input_is_named(what: str, text: str, seed: int) -> None:
    args = broken(make(seed), what)
    with pytest.raises(ValueError, match=text) as caught:
        head_loss(objective=objectives.build("tropd"), **args)
    assert isinstance(caught.value, NonFiniteLogits) == (what == "nan")


def test_an_objective_must_return_one_value_a_token(seed: int) -> None:
    with pytest.raises(ValueError, match=r"'loss' has shape \(\)"):
        run(make(seed), lambda s: (s.student_log_probs.sum(), {}))


def test_teacher_scores(seed: int) -> None:
    """The sampled token, the top k and the entropy, all of the softmax over the whole true vocabulary."""
    mb = make(seed)
    want = mb.teacher_scores()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6)):
        got = teacher_scores(
            mb.teacher_hidden.to(dtype), mb.teacher_weight.to(dtype), mb.tokens.rows, mb.tokens.token_ids, mb.k,
            HeadLayout(mb.vocab_size, chunk_tokens=4), entropy=True,
        )  # fmt: skip
        assert torch.equal(got.top_k_ids, want.top_k_ids) and got.entropy is not None and want.entropy is not None
        assert relative(got.log_probs, want.log_probs) < tolerance
        assert relative(got.top_k_log_probs, want.top_k_log_probs) < tolerance
        assert relative(got.entropy, want.entropy) < tolerance


def test_main_gradients_add_up_over_micro_batches(seed: int) -> None:
    """Into the buffer that Megatron's DDP gives a weight; autograd gets zeros of it."""
    objective, weight = objectives.build("tropd"), torch.nn.Parameter(make(seed).weight.float())
    weight.main_grad = torch.full_like(weight, 0.25)
    want = torch.full_like(weight, 0.25)
    for i in range(3):
        mb = replace(make(seed + i), weight=weight.detach().double())
        want += run(mb, objective)[2]
        layout, options = HeadLayout(mb.vocab_size), LossOptions(accumulate_main_grad=True)
        out = head_loss(
            mb.hidden.float(), weight, mb.tokens, mb.teacher_scores(), objective, layout, scale=SCALE, options=options
        )
        out.loss.backward()
    assert weight.grad is not None and weight.grad.abs().max() == 0 and weight.grad_added_to_main_grad
    assert relative(weight.main_grad, want) < 1e-5


def test_token_weights_go_with_their_tokens(seed: int) -> None:
    mb = make(seed)
    weights = torch.arange(1.0, len(mb.tokens) + 1)
    hidden = mb.hidden.clone().requires_grad_(True)
    losses = objective_and_loss("fkl", mb.world(hidden, mb.weight))[1]
    (losses * weights).sum().mul(SCALE).backward()
    for chunk in (None, 3):
        out, grad_h, _ = run(mb, objectives.build("fkl"), chunk_tokens=chunk, token_weights=weights)
        assert relative(grad_h, hidden.grad) < 1e-5
        assert relative(out.loss, (losses * weights).sum() * SCALE) < 1e-5
