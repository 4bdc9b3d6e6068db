"""On-policy distillation with the K1 estimator of the reverse KL."""

from dataclasses import dataclass

from torch import Tensor

from nemo_tropd.batch import TokenScores

from .objective import Metrics, Objective
from .terms import log_ratio, policy_gradient


@dataclass(frozen=True, kw_only=True)
class OPD(Objective):
    """-R l. Over x ~ pi_S its expected gradient is that of KL(pi_S || pi_T), prefix distribution frozen."""

    name = "opd"

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        return policy_gradient(scores, log_ratio(scores)), {}
