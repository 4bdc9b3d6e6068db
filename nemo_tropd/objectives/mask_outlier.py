"""OPD with outliers left out (TrOPD paper, Table 1)."""

from dataclasses import dataclass

from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import number

from .objective import Metrics, Objective
from .terms import log_ratio, policy_gradient


@dataclass(frozen=True, kw_only=True)
class MaskOutlier(Objective):
    """-1[R > tau] R l. The paper gives no ``tau``; -3 is this project's."""

    name = "mask_outlier"
    tau: float = number(-3.0)

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        ratio = log_ratio(scores)
        keep = (ratio > self.tau).to(ratio.dtype)
        return policy_gradient(scores, keep * ratio), {"kept": keep}
