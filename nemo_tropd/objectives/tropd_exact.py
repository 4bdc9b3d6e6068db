"""TrOPD without its two draws: token and gate in expectation, over the complete vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import choice, number

from .exact import ExactObjective, times
from .objective import Metrics
from .terms import choice_of_gate, choice_of_tail, forward_kl


@dataclass(frozen=True, kw_only=True)
class ExactTrOPD(ExactObjective):
    """Student tokens: -sum over v of stopgrad(p_v a_v R_v) log p_v + D F, with R = log(q / p), a_v the gate's
    expectation at v and D = sum p_v (1 - a_v), detached: TrOPD's mean over token and gate. Prefix tokens as TrOPD's.

    ``gate``: bernoulli and soft are one, a = min(q / p, 1), D the total variation; threshold has a = 1[q >= p].
    ``outlier``: F is ``fkl``, F_k over the teacher's top k (the paper; ``tail`` as there), or ``fkl_full``, KL(q || p).
    A token that the teacher rules out (q = 0) has a R = 0, the limit of rho log rho: the loss stays finite where
    ``opd_exact`` is infinite. Nothing is clamped and nothing left out. Metric ``trust``: 1 - D.
    """

    name = "tropd_exact"
    guidance_weight: float | None = number(0.001, at_least=0.0, optional=True)
    gate: str = choice_of_gate()
    outlier: str = choice("fkl", "fkl_full")
    tail: str = choice_of_tail()

    @property
    def needs_top_k(self) -> bool:
        return self.outlier == "fkl"

    @property
    def kernel(self) -> tuple[str, float]:
        return "threshold" if self.gate == "threshold" else "trust", float(self.outlier == "fkl_full")

    def trust(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """R and a, [C, V_local]."""
        ratio = log_q - log_p
        return ratio, (ratio >= 0).to(ratio.dtype) if self.gate == "threshold" else ratio.clamp(max=0).exp_()

    def weights(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        ratio, a = self.trust(log_p, log_q)
        return times(log_p, ratio.mul_(a).masked_fill_(a == 0, 0.0))

    def sums(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        w = self.weights(log_p, log_q)
        distrust = times(log_p, 1 - self.trust(log_p, log_q)[1]).sum(-1)
        forward = times(log_q, log_q - log_p).sum(-1) if self.outlier == "fkl_full" else torch.zeros_like(distrust)
        return torch.stack([w.sum(-1), distrust, (w * log_p).masked_fill_(w == 0, 0.0).sum(-1), forward], 1)

    def value(self, sums: Tensor) -> Tensor:
        return sums[:, 1] * sums[:, 3] - sums[:, 2]

    def logit_gradient(self, log_p: Tensor, log_q: Tensor, sums: Tensor) -> Tensor:
        gradient = super().logit_gradient(log_p, log_q, sums)
        return gradient.add_(sums[:, 1:2] * (log_p.exp() - log_q.exp())) if self.outlier == "fkl_full" else gradient

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        assert scores.exact is not None and scores.sums is not None
        distrust, forward = scores.sums[:, 1], scores.sums[:, 3]
        loss = scores.exact
        if self.outlier == "fkl":
            forward = forward_kl(scores, self.tail)
            loss = loss + distrust * forward
        return loss, {"trust": 1 - distrust, "forward_kl": forward, "outlier_loss": distrust * forward}
