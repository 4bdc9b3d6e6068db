"""The head's kernels on a GPU: the checks of the interpreter's tests, on the device that they are for."""

from __future__ import annotations

import pytest
import torch

from nemo_tropd import objectives
from nemo_tropd.batch import Sampling
from nemo_tropd.loss.head import LossOptions, head_loss, teacher_scores
from nemo_tropd.loss.inputs import HeadLayout
from tests.oracles.exact import EXACT, FINITE, batch, oracle, run_beside
from tests.oracles.micro_batch import VARIANTS, MicroBatch, make, objective_and_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def on_gpu(mb: MicroBatch) -> MicroBatch:
    moved = {k: v.cuda() for k, v in vars(mb).items() if isinstance(v, torch.Tensor)}
    tokens = type(mb.tokens)(**{k: v.cuda() for k, v in vars(mb.tokens).items()})
    return MicroBatch(**{**vars(mb), **moved, "tokens": tokens})


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradients(variant: str, dtype: torch.dtype) -> None:
    compare(variant, make(4), dtype)


@pytest.mark.parametrize("variant", ["tropd", "jsd", "entropy_opd"])
def test_value_and_gradients_as_sampled(variant: str) -> None:
    compare(variant, make(4, sampling=Sampling(0.6, 0.95, 20)), torch.float32)


def compare(variant: str, mb: MicroBatch, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:  # rounding must not move a draw to the other side of the gate
        mb.hidden, mb.teacher_hidden = mb.hidden / 4, mb.teacher_hidden / 4
        mb.hidden, mb.weight = mb.hidden.to(dtype).double(), mb.weight.to(dtype).double()
    mb = on_gpu(mb)
    h, w = mb.hidden.clone().requires_grad_(True), mb.weight.clone().requires_grad_(True)
    objective, losses = objective_and_loss(variant, mb.world(h, w))
    (losses.sum() / 37).backward()
    reference = mb.reference.gather(1, mb.tokens.token_ids[:, None])[:, 0].float()
    for chunk in (None, 5):  # one chunk; several on two streams
        h2, w2 = mb.hidden.to(dtype).requires_grad_(True), mb.weight.to(dtype).requires_grad_(True)
        layout = HeadLayout(mb.vocab_size, chunk_tokens=chunk, sampling=mb.sampling)
        out = head_loss(
            h2, w2, mb.tokens, mb.teacher_scores(), objective, layout,
            scale=1 / 37, options=LossOptions(reference_log_probs=reference),
        )  # fmt: skip
        out.loss.backward()
        for got, want in ((h2.grad, h.grad), (w2.grad, w.grad)):
            assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("variant", EXACT)
def test_exact_objectives(variant: str, dtype: torch.dtype) -> None:
    for chunk, ruled_out in ((None, 0), (5, 9 if variant in FINITE else 0)):
        mb = batch(4, ruled_out=ruled_out)
        if dtype == torch.bfloat16:  # tame, and rounded before both see it
            names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
            tame = {n: (getattr(mb, n) / (1 if "weight" in n else 4)).to(dtype).double() for n in names}
            mb = MicroBatch(**{**vars(mb), **tame})
        mb = on_gpu(mb)
        value, *want, size = oracle(variant, mb, 1 / 37)
        out, *got = run_beside(variant, mb, dtype, chunk=chunk)
        assert (out.loss.double() - value).abs() <= TOLERANCE[dtype] * size
        gate = "threshold" in variant and dtype == torch.bfloat16  # logits rounded to bf16 tie
        for mine, right in zip(got, want, strict=True):
            assert (mine.double() - right).norm() <= (5 if gate else 1) * TOLERANCE[dtype] * right.norm()


def test_two_streams_change_nothing() -> None:
    """A race between the streams would show as a difference between repeats, or from one chunk alone."""
    torch.manual_seed(0)
    h = torch.randn(1, 3000, 256, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(32064, 256, device="cuda", dtype=torch.bfloat16) * 0.1
    rows = torch.arange(3000, device="cuda")
    ids = torch.randint(32000, (3000,), device="cuda")
    first = teacher_scores(h, w, rows, ids, 64, HeadLayout(32000, chunk_tokens=256))
    from nemo_tropd.batch import LossTokens

    tokens = LossTokens(
        rows, ids, torch.zeros_like(rows, dtype=torch.bool), torch.rand(3000, device="cuda"),
        torch.full((3000,), float("nan"), device="cuda"), torch.zeros_like(rows),
    )  # fmt: skip
    grads = []
    for chunk in (256, 256, 256, 3000):
        layout = HeadLayout(32000, chunk_tokens=chunk)
        again = teacher_scores(h, w, rows, ids, 64, layout)
        if chunk == 256:  # products of another size may round otherwise
            assert torch.equal(again.top_k_ids, first.top_k_ids) and torch.equal(again.log_probs, first.log_probs)
        h2 = (h * 1.1).requires_grad_(True)
        head_loss(h2, w, tokens, first, objectives.build("tropd"), layout, scale=1e-3).loss.backward()
        grads.append(h2.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    assert (grads[0] - grads[3]).norm() < 1e-2 * grads[3].norm()
