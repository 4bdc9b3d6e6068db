"""TOP-D: a proximal teacher between student and teacher (arXiv 2607.04751)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import choice, number

from .objective import Metrics, Objective
from .terms import log_ratio, policy_gradient


@dataclass(frozen=True, kw_only=True)
class TOPD(Objective):
    """-stopgrad(log(alpha rho + 1 - alpha)) l: the gradient of KL(pi_S || alpha pi_T + (1 - alpha) pi_S).

    alpha = 1 is OPD; otherwise the reward is at least log(1 - alpha). ``baseline="global"`` subtracts the reward's mean
    over the global batch, from a first pass; a constant changes no expected gradient. Not to be confused with TrOPD.
    """

    name = "topd"
    alpha: float = number(0.2, above=0.0, at_most=1.0)
    baseline: str = choice("none", "global")
    baseline_value: float | None = number(None)

    @property
    def needs_first_pass(self) -> bool:
        return self.baseline == "global" and self.baseline_value is None

    def statistic(self, scores: TokenScores) -> Tensor:
        stay = math.log1p(-self.alpha) if self.alpha < 1 else -math.inf
        moved = log_ratio(scores) + math.log(self.alpha)
        return torch.logaddexp(moved, torch.full_like(moved, stay))

    def bind(self, statistics: Tensor, loss_tokens: int | None = None) -> Objective:
        return self._bound(baseline_value=float(statistics.double().mean()) if statistics.numel() else 0.0)

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        if self.needs_first_pass:
            raise ValueError("objective 'topd' with a global baseline is not bound: call bind(statistics)")
        reward = self.statistic(scores) - (self.baseline_value or 0.0)
        return policy_gradient(scores, reward), {"reward": reward}
