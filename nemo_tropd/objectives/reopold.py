"""REOPOLD: OPD with a floor under the reward (arXiv 2603.11137)."""

import math
from dataclasses import dataclass

from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import choice, number

from .objective import Metrics, Objective
from .terms import log_ratio, policy_gradient


@dataclass(frozen=True, kw_only=True)
class REOPOLD(Objective):
    """-max(R, c) l.

    Sources split over the floor: ``floor="bound"``, c = log(lambda) / (1 - lambda), follows from the bound on a convex
    combination and is the default; ``floor="logit"`` is c = log(lambda / (1 - lambda)). Lambda 0.3 gives -1.72 and
    -0.85. The TrOPD paper's REOPOLD is this clip alone.
    """

    name = "reopold"
    lambda_: float = number(0.3, above=0.0, below=1.0)
    floor: str = choice("bound", "logit")

    @property
    def c(self) -> float:
        """The floor in nats."""
        if self.floor == "bound":
            return math.log(self.lambda_) / (1 - self.lambda_)
        return math.log(self.lambda_ / (1 - self.lambda_))

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        ratio = log_ratio(scores)
        return policy_gradient(scores, ratio.clamp(min=self.c)), {"clipped": (ratio < self.c).to(ratio.dtype)}
