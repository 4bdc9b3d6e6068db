"""Exact objectives on one rank: their sampled twins' means, by enumeration of token and gate."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_tropd import objectives
from nemo_tropd.batch import LossTokens, Sampling, TeacherStates
from nemo_tropd.loss.head import LossOptions, head_loss
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.loss.teacher import TeacherHead
from nemo_tropd.parallel.vocab import NonFiniteLogits
from tests.oracles.exact import EXACT, FINITE, batch, oracle, run_beside
from tests.oracles.micro_batch import MicroBatch

pytestmark = pytest.mark.random

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture
def seed() -> int:
    value = random.randrange(10**6)
    print(f"seed {value}")
    return value


def error(got: Tensor, want: Tensor, size: Tensor | None = None) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / (want.norm() if size is None else size).clamp(min=1e-12))


def check(variant: str, mb: MicroBatch, dtype: torch.dtype, **options: Any) -> None:
    value, *grads, size = oracle(variant, mb, 1 / 37)
    out, *got = run_beside(variant, mb, dtype, **options)
    assert error(out.loss, value, size) < 1e-5  # the loss itself is returned in fp32
    for mine, want in zip(got, grads, strict=True):
        assert error(mine, want) < TOLERANCE[dtype], (variant, dtype, options)
    assert got[1][mb.vocab_size :].abs().max() == 0


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("variant", EXACT)
def test_the_twins_mean(variant: str, dtype: torch.dtype, seed: int) -> None:
    for chunk in (None, 1, 4):
        check(variant, batch(seed), dtype, chunk=chunk)
    check(variant, batch(seed, sampling=Sampling(0.7)), dtype)


@pytest.mark.parametrize("variant", FINITE)
def test_a_teacher_that_rules_tokens_out(variant: str, seed: int) -> None:
    mb = batch(seed, ruled_out=20)
    assert mb.teacher_log_probs().isinf().any()
    for dtype in TOLERANCE:
        check(variant, mb, dtype, chunk=4)
    check(variant, batch(seed, ruled_out=88, k=7), torch.float64)  # fewer tokens left than the top k has


@pytest.mark.parametrize("variant", EXACT)
def test_equal_models_have_nothing_to_learn(variant: str, seed: int) -> None:
    """To the bit, so that a threshold gate trusts every token; with the top k or the full vocabulary."""
    mb = batch(seed)
    mb = replace(mb, teacher_hidden=mb.hidden, teacher_weight=mb.weight)
    mb = replace(mb, tokens=replace(mb.tokens, guided=torch.zeros_like(mb.tokens.guided)))
    out, *grads = run_beside(variant, mb, torch.float32)
    assert out.loss.abs() < 1e-6 if not variant.startswith("tropd") else out.metrics["trust"] == len(mb.tokens)
    assert all(grad.abs().max() < 1e-6 for grad in grads)
    assert out.minima["log_ratio"] == 0


@pytest.mark.parametrize("variant", EXACT)
def test_a_vocabulary_of_one_token_and_a_micro_batch_of_none(variant: str, seed: int) -> None:
    mb, kept = batch(seed), [0, *range(91, 96)]  # one token and the padding
    one = replace(mb, weight=mb.weight[kept], teacher_weight=mb.teacher_weight[kept], vocab_size=1, k=1)
    check(variant, replace(one, tokens=replace(mb.tokens, token_ids=mb.tokens.token_ids * 0)), torch.float64)
    out, *grads = run_beside(variant, batch(seed, fill=0.0), torch.float32)
    assert out.loss == 0 and not any(bool(grad.any()) for grad in grads)
    assert set(out.metrics) == set(run_beside(variant, batch(seed), torch.float32)[0].metrics)


def test_the_reverse_kl_is_infinite_where_the_teacher_rules_out_what_the_student_does_not(seed: int) -> None:
    """The head says so, of the loss, and a prefix token there still has its own finite gradient."""
    mb = batch(seed, ruled_out=9)
    head = TeacherHead(
        TeacherStates(mb.teacher_hidden.flatten(0, 1)[mb.tokens.rows].float()), mb.teacher_weight.float(), 1
    )
    tokens = replace(mb.tokens, guided=torch.ones_like(mb.tokens.guided))
    h, w = mb.hidden.float().requires_grad_(True), mb.weight.float().requires_grad_(True)
    for guided, kept in ((mb.tokens, LossOptions(carry_bad=True)), (tokens, LossOptions())):
        objective = objectives.build("opd_exact", guidance_weight=0.5)
        out = head_loss(h, w, guided, head, objective, HeadLayout(91), scale=1.0, options=kept)
        (grad,) = torch.autograd.grad(out.loss, h)
        assert out.bad is None if guided is tokens else out.bad is not None and out.bad[0] == "the loss"
        assert bool(grad.isfinite().all()) == (guided is tokens)


def test_metrics(seed: int) -> None:
    mb = batch(seed)
    out, *_ = run_beside("tropd_exact", mb, torch.float32, chunk=4)
    world, student = mb.world(mb.hidden, mb.weight), ~mb.tokens.guided
    distance = 0.5 * (world.student.exp() - world.teacher.exp()).abs().sum(-1)
    want = {"trust": 1 - distance, "log_ratio": world.ratio, "forward_kl": world.forward_kl()}
    for name, values in {**want, "outlier_loss": distance * want["forward_kl"]}.items():
        torch.testing.assert_close(out.metrics[name], values[student].sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.teacher_log_probs.double(), world.at(world.teacher), rtol=1e-5, atol=1e-5)


def test_only_a_chunk_of_either_model_exists() -> None:
    """All tensors made during a pass are far below one model's logits of all tokens."""
    largest, count, vocabulary = 0, 400, 2000
    rows, mask = torch.arange(count), torch.zeros(count, dtype=torch.bool)
    tokens = LossTokens(rows, rows, mask, torch.rand(count), torch.full((count,), torch.nan), rows * 0)
    h, w = torch.randn(1, count, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    head = TeacherHead(TeacherStates(torch.randn(count, 6)), torch.randn(vocabulary, 6), 7)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return out

    with Watch():
        layout = HeadLayout(vocabulary, chunk_tokens=16)
        head_loss(h, w, tokens, head, objectives.build("tropd_exact"), layout, scale=1.0).loss.backward()
    assert 16 * vocabulary <= largest <= 2 * 16 * vocabulary < count * vocabulary / 10


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"objective": "tropd"}, "objective 'tropd' needs TeacherScores, not a TeacherHead"),
        ({"teacher": None}, "objective 'tropd_exact' needs the teacher's states and head"),
        ({"layout": HeadLayout(91, sampling=Sampling(1.0, 0.9, 20))}, "complete distributions, but tokens were cut"),
        ({"rows": 3}, "the teacher has states of 3 tokens, not"),
        ({"width": 3}, "do not go together; give \\[T, H'\\]"),
        ({"top_k": 92}, "k is 92; give 1..91"),
        ({"nan": True}, "teacher logits: row 0 has a NaN"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], text: str, seed: int) -> None:
    mb = batch(seed)
    states = mb.teacher_hidden.flatten(0, 1)[mb.tokens.rows].float()[: change.get("rows")]
    if "nan" in change:
        states[0] = torch.nan
    teacher: Any = TeacherHead(
        TeacherStates(states), mb.teacher_weight.float()[:, change.get("width", 0) :], change.get("top_k", 7)
    )
    teacher = mb.teacher_scores() if "teacher" in change else teacher
    objective = objectives.build(change.get("objective", "tropd_exact"))
    with pytest.raises(ValueError, match=text) as caught:
        head_loss(
            mb.hidden.float(), mb.weight.float(), mb.tokens, teacher, objective,
            change.get("layout", HeadLayout(91)), scale=1.0,
        )  # fmt: skip
    assert isinstance(caught.value, NonFiniteLogits) == ("nan" in change)
