"""OPD with the reward of outliers clipped (TrOPD paper, Table 1)."""

from dataclasses import dataclass

from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import number

from .objective import Metrics, Objective
from .terms import log_ratio, policy_gradient


@dataclass(frozen=True, kw_only=True)
class ClipOutlier(Objective):
    """-max(R, tau) l. The paper gives no ``tau``; -3 is this project's."""

    name = "clip_outlier"
    tau: float = number(-3.0)

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        ratio = log_ratio(scores)
        return policy_gradient(scores, ratio.clamp(min=self.tau)), {"clipped": (ratio < self.tau).to(ratio.dtype)}
