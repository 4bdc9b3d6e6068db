"""Exact objectives from their sampled twins, in float64: every outcome of token and gate, weighted by its chance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nemo_tropd import objectives
from nemo_tropd.batch import TeacherStates
from nemo_tropd.loss.head import LossOptions, head_loss
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.loss.teacher import TeacherHead

from .micro_batch import MicroBatch, make

# Every exact objective with each option that changes its equation.
EXACT: dict[str, dict[str, Any]] = {
    "opd_exact": {},
    "fkl_exact": {},
    "jsd_exact": {"beta": 0.3},
    "topd_exact": {},
    "topd_exact:one": {"alpha": 1.0},
    "tropd_exact": {},
    "tropd_exact:soft": {"gate": "soft", "tail": "ghost", "guidance_weight": 0.5},
    "tropd_exact:threshold": {"gate": "threshold"},
    "tropd_exact:full": {"outlier": "fkl_full", "importance_cap": 1.1},
    "tropd_exact:threshold full": {"gate": "threshold", "outlier": "fkl_full"},
}
FINITE = [
    name for name in EXACT if name not in ("opd_exact", "topd_exact:one")
]  # also where a teacher rules tokens out


def twin(variant: str, logits: Tensor, log_q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(the sampled twin's mean loss [T], whose gradient over ``logits`` is meant; the value [T] of the exact one): sums
    over the outcomes of token and gate, each weighted by its probability."""
    name, params = variant.partition(":")[0], EXACT[variant]
    l, q = logits.log_softmax(-1), log_q.exp()  # noqa: E741 (the paper's letter)
    p, vocabulary = l.detach().exp(), log_q.size(-1)
    ratio = torch.where(p > 0, log_q - l.detach(), 0.0)
    if name == "fkl_exact":
        loss = _forward(l, log_q, vocabulary)
        return loss, loss.detach()
    if name == "tropd_exact":
        full = params.get("outlier") == "fkl_full"
        trusted = (ratio >= 0).double() if params.get("gate") == "threshold" else ratio.exp().clamp(max=1)
        outlier = _forward(l, log_q, vocabulary if full else k, params.get("tail") == "ghost")
        reward = torch.where(trusted > 0, ratio, 0.0)  # what is never trusted has no reward, be it infinite
        loss = (p * trusted * -reward * l + p * (1 - trusted) * outlier[:, None]).sum(-1)
        return loss, loss.detach()
    if name == "opd_exact":
        return (p * -ratio * l).sum(-1), (p * -ratio).sum(-1)
    share = params["beta"] if name == "jsd_exact" else params.get("alpha", 0.2)
    mixture = share * q + (1 - share) * p
    reward = (mixture / p).log()
    value = (p * -reward).sum(-1)
    if name == "jsd_exact":
        value = (1 - share) * value + share * (torch.xlogy(q, q) - torch.xlogy(q, mixture)).sum(-1)
        reward = (1 - share) * reward
    return (p * -reward * l).sum(-1), value


def _forward(l: Tensor, log_q: Tensor, k: int, ghost: bool = False) -> Tensor:  # noqa: E741 (the paper's letter)
    top = log_q.sort(-1, descending=True).indices[:, :k]
    q, own = log_q.gather(1, top).exp(), l.gather(1, top)
    value = (torch.xlogy(q, q) - q * own).sum(-1)
    if ghost:
        rest, missing = 1 - q.sum(-1), 1 - own.exp().sum(-1)
        some = rest > 1e-12
        missing, rest = (torch.where(some, x, 1.0) for x in (missing, rest))
        value = value + torch.where(some, rest * (rest.log() - missing.log()), 0.0)
    return value


def batch(seed: int, *, ruled_out: int = 0, **shape: Any) -> MicroBatch:
    """A micro-batch of which no token of the vocabulary is near a tie of student and teacher; with ``ruled_out`` tokens
    that the teacher gives a logit of minus infinity, the sampled ones of the first states among them."""
    for attempt in range(1000):
        mb, g = make(seed + 10**7 * attempt, **shape), torch.Generator().manual_seed(seed + attempt)
        if ruled_out and len(mb.tokens):
            out = torch.cat([mb.tokens.token_ids[:2], torch.randperm(mb.vocab_size, generator=g)[:ruled_out]]).unique()
            weight, hidden = mb.teacher_weight.clone(), mb.teacher_hidden.clone()
            hidden[..., -1], weight[out] = 1.0, torch.tensor([0.0] * (hidden.size(-1) - 1) + [-torch.inf]).double()
            mb = replace(mb, teacher_weight=weight, teacher_hidden=hidden)
        student = (mb.hidden.flatten(0, 1)[mb.tokens.rows] @ mb.weight[: mb.vocab_size].t()).log_softmax(-1)
        if not bool(((mb.teacher_log_probs() - student).abs() < 3e-5).any()):
            return mb
    raise AssertionError("no micro-batch without a tie")


def oracle(variant: str, mb: MicroBatch, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and both gradients, and the sum of the losses' sizes."""
    h, w, t = mb.hidden.clone().requires_grad_(True), mb.weight.clone().requires_grad_(True), mb.tokens
    logits = h.flatten(0, 1)[t.rows] @ w[: mb.vocab_size].t() / mb.sampling.temperature
    loss, value = twin(variant, logits, mb.teacher_log_probs(), mb.k)
    sampled = logits.log_softmax(-1).gather(1, t.token_ids[:, None])[:, 0]
    if (cap := EXACT[variant].get("importance_cap")) is not None:
        weight = (sampled - t.behavior_log_probs.double()).exp().nan_to_num(nan=1.0).clamp(max=cap).detach()
        loss, value = weight * loss, weight * value
    guidance = EXACT[variant].get("guidance_weight", 0.001 if variant.startswith("tropd") else None)
    if guidance is not None:
        loss, value = (torch.where(t.guided, -guidance * sampled, x) for x in (loss, value))
    grads = torch.autograd.grad(loss.sum() * scale, (h, w), materialize_grads=True)
    return value.detach().sum() * scale, grads[0], grads[1], value.detach().abs().sum() * scale


def run_beside(
    variant: str,
    mb: MicroBatch,
    dtype: torch.dtype,
    *,
    chunk: int | None = None,
    group: Any = None,
    rank: int = 0,
    size: int = 1,
    parallel: bool = False,
    scale: float = 1 / 37,
) -> tuple[Any, Tensor, Tensor]:
    """The head's result and its gradients on this rank; ``parallel``: sequence parallel, the teacher's states split."""
    objective = objectives.build(variant.partition(":")[0], **EXACT[variant])
    h = (mb.hidden.chunk(size, 1)[rank] if parallel else mb.hidden).to(dtype).clone().requires_grad_(True)
    w = mb.weight.chunk(size, 0)[rank].to(dtype).clone().requires_grad_(True)
    states = mb.teacher_hidden.flatten(0, 1)[mb.tokens.rows].to(dtype)
    if parallel:
        each = -(-len(states) // size)
        states = torch.cat([states, states.new_zeros(each * size - len(states), states.size(1))])
        states = states[rank * each : (rank + 1) * each]
    head = TeacherHead(TeacherStates(states, parallel), mb.teacher_weight.chunk(size, 0)[rank].to(dtype), mb.k)
    layout = HeadLayout(mb.vocab_size, group, parallel, chunk, mb.sampling)
    out = head_loss(h, w, mb.tokens, head, objective, layout, scale=scale, options=LossOptions())
    out.loss.backward()
    assert h.grad is not None and w.grad is not None
    return out, h.grad, w.grad
