"""The chunked head on vocabulary shards, TP 2 and 4 on gloo, against float64 torch on the full vocabulary.

One group of processes a degree runs every case: starting processes costs more than the cases do.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tropd import objectives
from nemo_tropd.batch import Sampling, TeacherScores
from nemo_tropd.loss.divergence import exact_divergences
from nemo_tropd.loss.head import LossOptions, head_loss, teacher_scores
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.objectives import Objective
from nemo_tropd.parallel.vocab import NonFiniteLogits, resplit
from tests.dist.checks import Checks, counted
from tests.dist.run_distributed import run_distributed
from tests.dist.test_vocab_parallel import check_vocabulary
from tests.oracles.exact import EXACT, FINITE, batch, oracle, run_beside
from tests.oracles.micro_batch import POISON, VARIANTS, MicroBatch, make, objective_and_loss
from tests.oracles.sampled_states import check_states

pytestmark = pytest.mark.random

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# padding 5: an uneven true vocabulary; 40 + 24: the last of four shards (and half of the third) is padding only.
LAYOUTS = ({"vocab_size": 91, "padding": 5}, {"vocab_size": 40, "padding": 24})


def shard(weight: Tensor, rank: int, size: int, dtype: torch.dtype) -> Tensor:
    return weight.chunk(size, 0)[rank].to(dtype).clone().requires_grad_(True)


@dataclass(frozen=True)
class Exact:
    """A micro-batch in a dtype's values, and what the oracle makes of it."""

    mb: MicroBatch
    scores: TeacherScores
    objective: Objective
    loss: Tensor
    hidden: Tensor  # gradient
    weight: Tensor  # gradient
    size: Tensor  # losses of both signs cancel in the sum: its error is measured against the sum of their sizes


def exact_head(mb: MicroBatch, variant: str, dtype: torch.dtype, scale: float) -> Exact:
    mb = replace(mb, hidden=mb.hidden.to(dtype).double(), weight=mb.weight.to(dtype).double())
    h, w = mb.hidden.clone().requires_grad_(True), mb.weight.clone().requires_grad_(True)
    objective, losses = objective_and_loss(variant, mb.world(h, w))
    loss = losses.sum() * scale
    loss.backward()
    assert h.grad is not None and w.grad is not None
    size = losses.detach().abs().sum() * scale
    return Exact(mb, mb.teacher_scores(), objective, loss.detach(), h.grad, w.grad, size)


def run_exact(
    exact: Exact, dtype: torch.dtype, chunk: int | None, group: Any, parallel: bool, scale: float
) -> tuple[Any, Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The head on this rank, and this rank's part of what the oracle has."""
    rank, size, mb = dist.get_rank(group), dist.get_world_size(group), exact.mb
    h = mb.hidden.chunk(size, 1)[rank] if parallel else mb.hidden
    h = h.to(dtype).clone().requires_grad_(True)
    w = shard(mb.weight, rank, size, dtype)
    reference = mb.reference.gather(1, mb.tokens.token_ids[:, None])[:, 0].float()
    out = head_loss(
        h, w, mb.tokens, exact.scores, exact.objective, HeadLayout(mb.vocab_size, group, parallel, chunk, mb.sampling),
        scale=scale, options=LossOptions(reference_log_probs=reference),
    )  # fmt: skip
    out.loss.backward()
    want_h = exact.hidden.chunk(size, 1)[rank] if parallel else exact.hidden
    return out, h, w, (exact.loss, want_h, exact.weight.chunk(size, 0)[rank], exact.size)


def run_head(
    mb: MicroBatch, variant: str, dtype: torch.dtype, chunk: int | None, group: Any, parallel: bool, scale: float
) -> tuple[Any, Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The head on this rank and the oracle's loss and gradients for the same inputs (rounded to ``dtype``)."""
    return run_exact(exact_head(mb, variant, dtype, scale), dtype, chunk, group, parallel, scale)


def check_values_and_gradients(checks: Checks, group: Any, seed: int) -> None:
    """The oracle is asked once for all chunks and both ways to hold the hidden states."""
    for variant, (layout, dtype) in product(VARIANTS, ((0, torch.float32), (1, torch.float32), (0, torch.bfloat16))):
        # Under bf16's rounding a draw or a threshold may fall to the other side: those inputs are fixed, and tame.
        fixed = dtype == torch.bfloat16
        mb = make(4 if fixed else seed + layout, **LAYOUTS[layout])
        if fixed:
            mb = replace(mb, hidden=mb.hidden / 4, teacher_hidden=mb.teacher_hidden / 4)
        exact = exact_head(mb, variant, dtype, 1 / 37)
        for chunk, parallel in product((6, None) if fixed else (4, 5, None), (False, True)):
            case = f"{variant} {LAYOUTS[layout]} chunk {chunk} sp {parallel} {dtype}"
            out, h, w, (want, want_h, want_w, size) = run_exact(exact, dtype, chunk, group, parallel, 1 / 37)
            checks.close(case + " loss", out.loss, want, TOLERANCE[dtype], size)
            checks.close(case + " hidden", h.grad, want_h, TOLERANCE[dtype])
            checks.close(case + " weight", w.grad, want_w, TOLERANCE[dtype])


def check_sampling(checks: Checks, group: Any, seed: int) -> None:
    """Tokens sampled at a temperature, from the top k and top p of the full vocabulary: by enumeration, and by equations
    on rows of which some are prefixes and some tokens were cut off."""
    rank, size, draw = dist.get_rank(group), dist.get_world_size(group), random.Random(seed)
    for i in range(10):
        top_k = draw.randint(1, 32)
        cut = Sampling(draw.uniform(0.3, 1.5), draw.uniform(0.2, 1.0), top_k) if i else Sampling(0.6, 0.95, 20)
        for failure in check_states(seed + i, cut, torch.float64, 1e-6, group, rank, size):
            checks.true(f"{cut} {failure}", False)
        variant, layout, parallel = draw.choice(list(VARIANTS)), LAYOUTS[i % 2], bool(i // 2 % 2)
        mb, chunk = make(seed + i, sampling=cut, **layout), (5, None)[i % 3 % 2]
        out, h, w, (want, want_h, want_w, of) = run_head(mb, variant, torch.float32, chunk, group, parallel, 1.0)
        case = f"{variant} {layout} {cut} sp {parallel}"
        checks.close(case + " loss", out.loss, want, 1e-5, of)
        checks.close(case + " hidden", h.grad, want_h, 1e-5)
        checks.close(case + " weight", w.grad, want_w, 1e-5)
    empty = make(1, fill=0.0, sampling=Sampling(0.6, 0.95, 20))
    out, h, w, _ = run_head(empty, "tropd", torch.float32, None, group, False, 0.1)
    checks.true("empty, cut", out.loss.item() == 0 and not h.grad.any() and not w.grad.any())


def check_exact(
    checks: Checks, group: Any, seed: int, dtype: torch.dtype = torch.float64, variants: Sequence[str] = tuple(EXACT)
) -> None:
    """Exact objectives against the mean of their sampled twins; a rank may have no true column, or no token its share."""
    rank, size, tolerance = dist.get_rank(group), dist.get_world_size(group), 1e-10 if dtype == torch.float64 else 1e-5
    shapes = ({}, {"vocab_size": 40, "padding": 24}, {"length": 4, "fill": 0.2}, {"fill": 0.0})
    for i, variant in enumerate(variants):
        shape, parallel = shapes[(seed + i) % 4], bool((seed // 4 + i) % 2)
        # On several ranks both models' log-sum-exp are reduced in another order: ties then fall either way.
        mb = batch(seed + i, ruled_out=9 if variant in FINITE and i % 3 else 0, **shape)
        value, *want, of = oracle(variant, mb, 1 / 37)
        out, *got = run_beside(
            variant, mb, dtype, chunk=(5, None)[i % 2], group=group, rank=rank, size=size, parallel=parallel
        )
        want = [want[0].chunk(size, 1)[rank] if parallel else want[0], want[1].chunk(size, 0)[rank]]
        case = f"exact {variant} {shape} sp {parallel} {dtype}"
        checks.close(case + " loss", out.loss, value, 1e-5, of)
        for what, mine, right in zip(("hidden", "weight"), got, want, strict=True):
            checks.close(f"{case} {what}", mine, right, tolerance)


def check_resplit(checks: Checks, group: Any) -> None:
    """A head in equal parts, cut anew for a student whose vocabulary is padded otherwise."""
    rank, size, full = dist.get_rank(group), dist.get_world_size(group), torch.randn(24, 3, generator=torch.Generator())
    for columns in (1, 24 // size, 24 // size + 3, 30):
        want = torch.nn.functional.pad(full, (0, 0, 0, 30 * size))[rank * columns :][:columns]
        checks.true(f"resplit {columns}", torch.equal(resplit(full.chunk(size)[rank], columns, rank * columns, group), want))
    checks.true("resplit, a part each", torch.equal(resplit(full, 5, 5 * rank, None), full[5 * rank :][:5]))


def check_collectives(checks: Checks, group: Any, seed: int) -> None:
    mb, rank, size = make(seed), dist.get_rank(group), dist.get_world_size(group)
    scores = mb.teacher_scores()
    for parallel in (False, True):
        for objective in (objectives.build("tropd"), objectives.build("entropy_opd", tau=1.0)):
            h = (mb.hidden.chunk(size, 1)[rank] if parallel else mb.hidden).float().clone().requires_grad_(True)
            w = shard(mb.weight, rank, size, torch.float32)
            chunks = -(-len(mb.tokens) // 5)
            with counted() as forward:
                out = head_loss(
                    h, w, mb.tokens, scores, objective, HeadLayout(mb.vocab_size, group, parallel, 5), scale=0.1
                )  # fmt: skip
            with counted() as backward:
                out.loss.backward()
            want = {"MAX": chunks, "SUM": chunks}
            want |= {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1} if parallel else {"all_reduce": 1}
            checks.true(f"collectives forward, sp {parallel}", dict(forward) == want, forward)
            checks.true(f"collectives backward, sp {parallel}", not backward, backward)
    h, w = mb.hidden.float().requires_grad_(True), shard(mb.weight, rank, size, torch.float32)
    cut = HeadLayout(mb.vocab_size, group, chunk_tokens=5, sampling=Sampling(0.6, 0.95, 20))
    with counted() as forward:
        head_loss(h, w, mb.tokens, scores, objectives.build("tropd"), cut, scale=0.1)
    want = {"MAX": chunks, "SUM": chunks, "all_gather_into_tensor": chunks, "all_reduce": 1}
    checks.true("collectives forward, cut", dict(forward) == want, forward)
    with counted() as forward:
        run_beside("tropd_exact", mb, torch.float32, chunk=5, group=group, rank=rank, size=size)
    want = {"MAX": chunks, "SUM": 2 * chunks, "all_gather_into_tensor": chunks, "all_reduce": 1}
    checks.true("collectives forward, exact", dict(forward) == want, forward)
    with counted() as forward:
        teacher_scores(
            mb.teacher_hidden.float(), shard(mb.teacher_weight, rank, size, torch.float32), mb.tokens.rows,
            mb.tokens.token_ids, 7, HeadLayout(mb.vocab_size, group, chunk_tokens=5), entropy=True,
        )  # fmt: skip
    checks.true("collectives teacher", dict(forward) == {"all_gather_into_tensor": chunks}, forward)


def check_teacher(checks: Checks, group: Any, seed: int) -> None:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for layout in LAYOUTS:
        for k in (1, 7, layout["vocab_size"]):
            mb = replace(make(seed, **layout), k=k)
            want = mb.teacher_scores()
            for parallel, chunk in ((False, 5), (True, None)):
                h = mb.teacher_hidden.chunk(size, 1)[rank] if parallel else mb.teacher_hidden
                got = teacher_scores(
                    h.float(), shard(mb.teacher_weight, rank, size, torch.float32), mb.tokens.rows,
                    mb.tokens.token_ids, k, HeadLayout(mb.vocab_size, group, parallel, chunk), entropy=True,
                )  # fmt: skip
                case = f"teacher {layout} k {k} sp {parallel}"
                assert got.entropy is not None and want.entropy is not None
                checks.close(case + " log-probs", got.log_probs, want.log_probs, 1e-5)
                checks.close(case + " top k", got.top_k_log_probs, want.top_k_log_probs, 1e-5)
                checks.close(case + " entropy", got.entropy, want.entropy, 1e-5)
                checks.true(case + " ids", torch.equal(got.top_k_ids, want.top_k_ids), got.top_k_ids)


def check_empty(checks: Checks, group: Any) -> None:
    """An all-masked micro-batch: zeros, on every rank, without a deadlock, with every metric's name."""
    mb, full = make(1, fill=0.0), make(1)
    for parallel in (False, True):
        out, h, w, (want, *_) = run_head(mb, "tropd", torch.float32, None, group, parallel, 0.1)
        checks.true("empty loss", out.loss.item() == 0 == want.item())
        checks.true("empty gradients", bool((h.grad == 0).all() and (w.grad == 0).all()))
        checks.true("empty minima", out.minima["log_ratio"].item() == float("inf"))
        other, *_ = run_head(full, "tropd", torch.float32, None, group, parallel, 0.1)
        checks.true("empty metrics", set(other.metrics) == set(out.metrics))
        checks.true("empty sums", all(v.item() == 0 for v in out.metrics.values()), out.metrics)


def check_micro_batches(checks: Checks, group: Any, data_group: Any, seed: int) -> None:
    """Main gradients: two unequal micro-batches on each data-parallel rank add up to one global loss over N tokens."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    replicas, replica = (1, 0) if data_group is None else (dist.get_world_size(data_group), dist.get_rank(data_group))
    batches = [make(seed + i, fill=f) for i, f in enumerate((0.9, 0.1, 0.5, 0.0)[: 2 * replicas])]
    batches = [replace(mb, weight=batches[0].weight) for mb in batches]
    total = sum(len(mb.tokens) for mb in batches)
    full = batches[0].weight.clone().requires_grad_(True)
    losses = torch.cat([objective_and_loss("tropd", mb.world(mb.hidden, full))[1] for mb in batches]) / total
    want = losses.sum()
    want.backward()
    for zero_out in (False, True):
        w = shard(full.detach(), rank, size, torch.float32)
        w.main_grad = torch.zeros_like(w)
        w.zero_out_wgrad = zero_out
        loss = torch.zeros(1)
        for mb in batches[2 * replica : 2 * replica + 2]:
            out = head_loss(
                mb.hidden.float().requires_grad_(True), w, mb.tokens, mb.teacher_scores(), objectives.build("tropd"),
                HeadLayout(mb.vocab_size, group, chunk_tokens=5), scale=1 / total,
                options=LossOptions(accumulate_main_grad=True),
            )  # fmt: skip
            out.loss.backward()
            loss += out.loss.detach()
        checks.true("main grad flag", w.grad_added_to_main_grad and bool((w.grad == 0).all()))
        if data_group is not None:
            dist.all_reduce(w.main_grad, group=data_group)
            dist.all_reduce(loss, group=data_group)
        checks.close(f"micro-batches loss, {replicas} replicas", loss[0], want, 1e-5, losses.detach().abs().sum())
        checks.close(f"micro-batches weight, {replicas} replicas", w.main_grad, full.grad.chunk(size, 0)[rank], 1e-5)


def check_divergences(checks: Checks, group: Any, seed: int) -> None:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for layout, extra in (LAYOUTS[0], 0), (LAYOUTS[1], 0), (LAYOUTS[0], 12):
        mb = make(seed, **layout)
        rows, vocab = mb.tokens.rows, mb.vocab_size
        s = (mb.hidden.flatten(0, 1)[rows] @ mb.weight[:vocab].t()).log_softmax(-1)
        t = mb.teacher_log_probs()
        want = {
            "reverse_kl": (s.exp() * (s - t)).sum(-1),
            "forward_kl": (t.exp() * (t - s)).sum(-1),
            "one_minus_tv": 1 - 0.5 * (s.exp() - t.exp()).abs().sum(-1),
            "student_entropy": -(s.exp() * s).sum(-1),
            "teacher_entropy": -(t.exp() * t).sum(-1),
            "top1_agreement": (s.argmax(-1) == t.argmax(-1)).double(),
        }
        teacher = torch.cat([mb.teacher_weight, torch.full((extra, mb.teacher_weight.size(1)), POISON).double()])
        for parallel, chunk in ((False, 4), (True, None)):
            part = [h.chunk(size, 1)[rank] if parallel else h for h in (mb.hidden, mb.teacher_hidden)]
            got = exact_divergences(
                part[0].float(), shard(mb.weight, rank, size, torch.float32), part[1].float(),
                shard(teacher, rank, size, torch.float32), rows, HeadLayout(vocab, group, parallel, chunk),
            )  # fmt: skip
            for name, values in want.items():
                checks.close(f"divergence {name} {layout} extra {extra} sp {parallel}", got[name], values, 2e-5)


def check_errors(checks: Checks, group: Any) -> None:
    """Every rank raises, and afterwards the group still works: no rank was left inside a collective."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mb = make(5)
    scores, layout = mb.teacher_scores(), HeadLayout(mb.vocab_size, group)
    h, w = mb.hidden.float(), shard(mb.weight, rank, size, torch.float32)
    poisoned = w.detach().clone()
    if rank == 0:  # one column, on one rank only
        poisoned[3] = float("nan")
    wrong_ids = replace(mb.tokens, token_ids=mb.tokens.token_ids.clone().index_fill_(0, torch.tensor([2]), 91))
    cases = {
        "row 0 has a NaN": (poisoned, mb.tokens, scores),
        r"token_ids[2] is 91": (w, wrong_ids, scores),
        "teacher.log_probs has shape": (w, mb.tokens, replace(scores, log_probs=scores.log_probs[1:])),
        "give weight [V_local, H]": (w[:, 1:], mb.tokens, scores),
    }
    for text, (weight, tokens, teacher) in cases.items():
        message = "nothing was raised"
        try:
            head_loss(h, weight, tokens, teacher, objectives.build("tropd"), layout, scale=1.0)
        except ValueError as error:
            message = str(error)
        checks.true(f"error {text!r}", text in message, message)
    with pytest.raises(NonFiniteLogits, match="teacher logits: row 0"):
        teacher_scores(h, poisoned, mb.tokens.rows, mb.tokens.token_ids, 3, layout)
    alive = torch.ones(1)
    dist.all_reduce(alive, group=group)
    checks.true("group alive", alive.item() == size)


def work(rank: int, world_size: int, seed: int) -> tuple[list[str], int, float]:
    started, checks, group = time.monotonic(), Checks(), dist.group.WORLD
    check_vocabulary(checks, rank, world_size, seed)
    check_values_and_gradients(checks, group, seed)
    check_sampling(checks, group, seed)
    check_exact(checks, group, seed)
    check_exact(checks, group, seed + 1, torch.float32)
    check_resplit(checks, group)
    check_collectives(checks, group, seed)
    check_teacher(checks, group, seed)
    check_empty(checks, group)
    check_micro_batches(checks, group, None, seed)
    check_divergences(checks, group, seed)
    check_errors(checks, group)
    if world_size == 4:
        tensor = [dist.new_group(r) for r in ([0, 1], [2, 3])]
        data = [dist.new_group(r) for r in ([0, 2], [1, 3])]
        check_micro_batches(checks, tensor[rank // 2], data[rank % 2], seed)
    return checks.failures, checks.count, time.monotonic() - started


@pytest.mark.parametrize("world_size", [2, 4])
def test_head_on_shards(world_size: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    for rank, (failures, count, seconds) in enumerate(run_distributed(work, world_size, seed, timeout_s=240)):
        print(f"rank {rank}: {count} checks in {seconds:.1f} s")
        assert count > 400
        assert not failures, f"seed {seed}, rank {rank}:\n" + "\n".join(failures)
