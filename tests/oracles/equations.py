"""The objectives written a second time, in float64 over the full vocabulary, straight from their equations.

Nothing here shares code or shape with the implementation: every function sees whole distributions, asks autograd for
whatever it differentiates, and writes detached quantities with ``detach`` where the equation says stopgrad.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .sampling import FULL, Cut, renormalised


@dataclass
class World:
    """T states over a vocabulary of V. All float64; ``logits`` carries gradient."""

    logits: Tensor  # [T, V] the student's
    teacher: Tensor  # [T, V] log pi_T
    x: Tensor  # [T] sampled tokens
    u: Tensor  # [T] draws
    k: int
    guided: Tensor  # [T] bool
    behavior: Tensor  # [T], NaN where guided
    reference: Tensor  # [T, V] log pi_ref
    tau_entropy: float = math.nan  # the batch's threshold, where an objective has one
    mask_sum: float = math.nan
    baseline: float = 0.0
    sampling: Cut = FULL

    @property
    def student(self) -> Tensor:
        return (self.logits / self.sampling.temperature).log_softmax(-1)

    def at(self, table: Tensor) -> Tensor:
        return (table * torch.nn.functional.one_hot(self.x, table.size(-1))).sum(-1)

    @property
    def likelihood(self) -> Tensor:
        return renormalised(self.logits, self.x, self.guided, self.sampling)

    @property
    def ratio(self) -> Tensor:
        return (self.at(self.teacher) - self.likelihood).detach()

    @property
    def top(self) -> Tensor:
        """[T, V]: 1 on the teacher's k most probable tokens."""
        order = self.teacher.sort(-1, descending=True).indices[:, : self.k]
        return torch.zeros_like(self.teacher).scatter(1, order, 1.0)

    def trust(self, gate: str = "bernoulli") -> Tensor:
        rho = self.ratio.exp()
        if gate == "soft":
            return rho.clamp(max=1)
        return ((rho >= 1) if gate == "threshold" else (self.u < rho.clamp(max=1))).double()

    def forward_kl(self, tail: str = "none") -> Tensor:
        p, q = self.teacher.exp(), self.student.exp()
        value = (self.top * p * (self.teacher - self.student)).sum(-1)
        if tail == "ghost":
            rest_p, rest_q = ((1 - self.top) * p).sum(-1), ((1 - self.top) * q).sum(-1)
            value = value + torch.where(rest_p > 0, rest_p * (rest_p.log() - rest_q.log()), 0.0)
        return value


def entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1).detach()


def opd(w: World) -> Tensor:
    return -w.ratio * w.likelihood


def fkl(w: World, tail: str = "none") -> Tensor:
    return w.forward_kl(tail)


def jsd(w: World, beta: float = 0.5, teacher_term: str = "differentiated") -> Tensor:
    mixture = (beta * w.teacher.exp() + (1 - beta) * w.student.exp()).log()
    at_x = (beta * w.at(w.teacher).exp() + (1 - beta) * w.likelihood.exp()).log()
    first = (w.top * w.teacher.exp() * (w.teacher - mixture)).sum(-1)
    first = first.detach() if teacher_term == "detached" else first
    reward = (at_x - w.likelihood).detach()
    return beta * first + (1 - beta) * -reward * w.likelihood


def entropy_opd(w: World) -> Tensor:
    return -(entropy(w.student) > w.tau_entropy).double() * w.ratio * w.likelihood


def clip_outlier(w: World, tau: float = -3.0) -> Tensor:
    return -torch.maximum(w.ratio, torch.tensor(tau).double()) * w.likelihood


def mask_outlier(w: World, tau: float = -3.0) -> Tensor:
    return -(w.ratio > tau).double() * w.ratio * w.likelihood


def fkl_outlier(w: World, gate: str = "bernoulli", tail: str = "none") -> Tensor:
    m = w.trust(gate)
    return -m * w.ratio * w.likelihood + (1 - m) * w.forward_kl(tail)


def tropd(
    w: World,
    gate: str = "bernoulli",
    tail: str = "none",
    outlier: str = "fkl",
    tau: float = -3.0,
    guidance_weight: float = 0.001,
) -> Tensor:
    if outlier == "fkl":
        loss = fkl_outlier(w, gate, tail)
    else:
        rest = clip_outlier(w, tau) if outlier == "clip" else 0.0
        loss = -w.trust(gate) * w.ratio * w.likelihood + (1 - w.trust(gate)) * rest
    return torch.where(w.guided, -guidance_weight * w.likelihood, loss)


def eopd(w: World, tau: float = 0.8, alpha: float = 1.0, eps: float = 0.2, old_policy: str = "student") -> Tensor:
    fresh = w.behavior.isnan() if old_policy == "behavior" else torch.ones_like(w.guided)
    old = torch.where(fresh, w.likelihood.detach(), w.behavior)
    r = (w.likelihood - old).exp()
    clipped = torch.minimum(torch.maximum(r, torch.tensor(1 - eps).double()), torch.tensor(1 + eps).double())
    reverse = -torch.minimum(r * w.ratio, clipped * w.ratio)
    p = w.top * w.teacher.exp()
    q = p / p.sum(-1, keepdim=True)
    forward = (torch.xlogy(q, q) - q * w.student).sum(-1)
    return reverse + alpha * (entropy(w.teacher) > tau).double() * forward


def reopold(w: World, lambda_: float = 0.3, floor: str = "bound") -> Tensor:
    c = math.log(lambda_) / (1 - lambda_) if floor == "bound" else math.log(lambda_ / (1 - lambda_))
    return clip_outlier(w, c)


def reopold_2stage(w: World, stage: int = 1, lambda_: float = 0.3) -> Tensor:
    c = math.log(lambda_) / (1 - lambda_)
    mask = (w.ratio >= c) if stage == 1 else (entropy(w.student) >= w.tau_entropy)
    return mask.double() * clip_outlier(w, c) * len(w.x) / w.mask_sum


def aopd(w: World, tail: str = "none") -> Tensor:
    g = (w.ratio <= 0).double()
    return g * w.forward_kl(tail) + (1 - g) * opd(w)


def topd(w: World, alpha: float = 0.2) -> Tensor:
    reward = torch.log(alpha * w.ratio.exp() + 1 - alpha)
    return -(reward - w.baseline) * w.likelihood


def gopd(w: World, lambda_: float = 1.25) -> Tensor:
    t, s, r = w.at(w.teacher), w.likelihood.detach(), w.at(w.reference)
    return -(lambda_ * (t - r) - (s - r)) * w.likelihood


def tropd_aopd(w: World, aopd_coef: float = 1.0) -> Tensor:
    positive = (w.ratio > 0).double()
    extra = torch.where(w.guided, 0.0, aopd_coef * positive * opd(w))
    return tropd(w) + extra


EQUATIONS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        opd, fkl, jsd, entropy_opd, clip_outlier, mask_outlier, fkl_outlier, tropd, eopd, reopold, reopold_2stage,
        aopd, topd, gopd, tropd_aopd,
    )
}  # fmt: skip
