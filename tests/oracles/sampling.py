"""What temperature, top-k and top-p mean, one token at a time; and expected gradients under them in closed form.

Nothing here shares code with the implementation. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor


class Cut(Protocol):
    """The three numbers; top_k 0 is the complete vocabulary."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...


class _Full:
    temperature, top_k, top_p = 1.0, 0, 1.0


FULL: Cut = _Full()


def kept(logits: Sequence[float], cut: Cut) -> list[int]:
    """Ids that may be sampled: the top_k largest (lower ids first), of those the fewest with at least top_p of their
    mass, and at least one."""
    order = sorted(range(len(logits)), key=lambda v: (-logits[v], v))[: cut.top_k or None]
    weights = [math.exp((logits[v] - max(logits)) / cut.temperature) for v in order]
    count, mass, total = 0, 0.0, math.fsum(weights)
    while count < len(order) and (count == 0 or cut.top_p == 1 or mass < cut.top_p * total):
        mass += weights[count]
        count += 1
    return order[:count]


def near_a_cut(logits: Tensor, cut: Cut, margin: float) -> bool:
    """Whether rounding may change what is kept of a row of ``logits`` [T, V]."""
    for row in logits.detach().tolist():
        order = sorted(row, reverse=True)
        if 0 < cut.top_k < len(row) and order[cut.top_k - 1] - order[cut.top_k] < margin:
            return True
        if cut.top_p < 1:
            weights = [math.exp((z - order[0]) / cut.temperature) for z in order[: cut.top_k or None]]
            total = math.fsum(weights)
            if any(abs(mass / total - cut.top_p) < margin for mass in accumulate(weights[:-1])):
                return True
    return False


def renormalised(logits: Tensor, x: Tensor, guided: Tensor, cut: Cut) -> Tensor:
    """[T]: log-probability of x[t] among what is kept of logits[t] [V] and x[t] itself; of all where guided."""
    scaled, left_out = logits / cut.temperature, torch.zeros(logits.shape, dtype=torch.bool)
    for row, (z, token, whole) in enumerate(zip(logits.detach().tolist(), x.tolist(), guided.tolist(), strict=True)):
        if not whole and (cut.top_k or cut.top_p < 1):
            left_out[row] = True
            left_out[row, [*kept(z, cut), token]] = False
    mass = scaled.masked_fill(left_out.to(logits.device), -math.inf).logsumexp(-1)
    return scaled.gather(1, x[:, None])[:, 0] - mass


def distribution(logits: Tensor, cut: Cut) -> Tensor:
    """[V], probabilities, 0 where nothing is sampled."""
    ids = kept(logits.tolist(), cut)
    weights = {v: math.exp((float(logits[v]) - float(logits.max())) / cut.temperature) for v in ids}
    total = math.fsum(weights.values())
    return torch.tensor([weights.get(v, 0.0) / total for v in range(len(logits))], dtype=torch.float64)


def expected(objective: str, logits: Tensor, teacher: Tensor, k: int, cut: Cut) -> tuple[Tensor, Tensor]:
    """Mean over x ~ q (and over the gate) of the loss at one state, and its gradient over ``logits`` [V], with what is
    kept held constant. ``teacher``: its logits. opd: grad KL(q || pi_T); tropd: trust region of q, F_k of the complete
    softmax; prefix: cross entropy of pi_T, of the complete softmax."""
    temperature = cut.temperature
    p, pi, q = (logits / temperature).softmax(-1), (teacher / temperature).softmax(-1), distribution(logits, cut)
    if objective == "prefix":
        return -(pi * p.log()).sum(), (p - pi) / temperature
    inside = q > 0
    log_q = torch.where(inside, q.clamp(min=1e-300).log(), 0.0)
    ratio = torch.where(inside, pi.log() - log_q, 0.0)
    trust = ratio.clamp(max=0).exp() if objective == "tropd" else torch.ones_like(q)
    rewards = q * trust * ratio
    outside = (q * (1 - trust)).sum()
    top = torch.zeros_like(pi).index_fill(0, pi.topk(k).indices, 1.0)
    forward = (top * pi * (pi.log() - p.log())).sum()
    value = -(rewards * log_q).sum() + outside * forward
    slope = -(rewards - q * rewards.sum()) + outside * ((top * pi).sum() * p - top * pi)
    return value, slope / temperature
