"""Log-probabilities and top-k on one rank: value, gradient, dtypes, padding, errors."""

from __future__ import annotations

import pytest
import torch

from nemo_tropd.parallel.vocab import NonFiniteLogits, largest, vocab_parallel_log_probs, vocab_parallel_top_k

pytestmark = pytest.mark.random


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [None, 37, 1])
def test_log_probs_and_gradient(dtype: torch.dtype, vocab_size: int | None) -> None:
    true = vocab_size or 41
    logits = (torch.randn(5, 3, 41) * 4).to(dtype)
    logits[..., true:] = 1e4
    full = logits[..., :true].double().requires_grad_(True)
    logits.requires_grad_(True)
    ids = torch.randint(0, true, (5, 3, 6))  # repeats: their gradients must add up
    weights = torch.randn(5, 3, 6)
    want = full.log_softmax(-1).gather(-1, ids)
    got = vocab_parallel_log_probs(logits, ids, vocab_size=vocab_size)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    assert logits.grad.dtype == dtype and bool((logits.grad[..., true:] == 0).all())
    rounding = 1e-5 if dtype.itemsize >= 4 else 1e-2
    torch.testing.assert_close(logits.grad[..., :true].double(), full.grad, rtol=rounding, atol=rounding)


def test_masked_columns_are_impossible_tokens() -> None:
    """-inf logits, as a sampler leaves them, are not an error; a row of nothing else is."""
    logits = torch.randn(2, 6)
    logits[0, :3] = float("-inf")
    logits.requires_grad_(True)
    out = vocab_parallel_log_probs(logits, torch.tensor([[0, 3], [0, 3]]))
    assert out[0, 0] == float("-inf")
    out[:, 1].sum().backward()
    assert logits.grad.isfinite().all() and bool((logits.grad[0, :3] == 0).all())
    with pytest.raises(NonFiniteLogits, match="row 1"):
        vocab_parallel_log_probs(torch.tensor([[0.0], [float("-inf")]]), torch.tensor([[0], [0]]))


@pytest.mark.parametrize("k", [1, 5, 37])
def test_top_k(k: int) -> None:
    logits = torch.randn(4, 41).double()
    logits[:, 37:] = 1e4
    want = logits[:, :37].log_softmax(-1).topk(k, -1)
    got = vocab_parallel_top_k(logits, k, vocab_size=37)
    assert got.log_probs.dtype == torch.float32 and torch.equal(got.token_ids, want.indices)
    torch.testing.assert_close(got.log_probs.double(), want.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.log_z.double(), logits[:, :37].logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 64, 1023, 4096, 5000, 8192])
@pytest.mark.parametrize("k", [1, 8])
def test_the_fast_top_k_is_the_plain_one(width: int, k: int) -> None:
    values = torch.randperm(3 * width).float().view(3, width)  # no ties: the places are unique
    values[0, -1] = 1e6
    k = min(k, width)
    want = values.topk(k, -1)
    got = largest(values, k)
    assert torch.equal(got[0], want.values) and torch.equal(got[1], want.indices)


def test_ties_still_give_k_different_tokens() -> None:
    values, ids = largest(torch.zeros(2, 4096), 8)
    assert bool((values == 0).all()) and all(len(set(row)) == 8 for row in ids.tolist())


def test_bad_input_is_named() -> None:
    logits = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"token_ids\[1, 0, 0\] is 7, outside the vocabulary 0\.\.6"):
        vocab_parallel_log_probs(logits, torch.tensor([[[0]] * 3, [[7]] * 3]), vocab_size=7)
    with pytest.raises(ValueError, match="leading dimensions"):
        vocab_parallel_log_probs(logits, torch.zeros(3, 2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="give integers"):
        vocab_parallel_log_probs(logits, torch.zeros(2, 3, 1))
    for k in (0, 8):
        with pytest.raises(ValueError, match=rf"k is {k}; give 1\.\.7"):
            vocab_parallel_top_k(logits, k, vocab_size=7)
    for size in (0, 9):
        with pytest.raises(ValueError, match=f"vocab_size is {size}"):
            vocab_parallel_top_k(logits, 1, vocab_size=size)
    for bad in (float("nan"), float("inf")):
        logits[1, 2, 4] = bad
        for call in (
            lambda: vocab_parallel_log_probs(logits, torch.zeros(2, 3, 1, dtype=torch.int64)),
            lambda: vocab_parallel_top_k(logits, 2),
        ):
            with pytest.raises(NonFiniteLogits, match="logits: row 5"):
                call()
