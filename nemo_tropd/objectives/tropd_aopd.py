"""TrOPD with AOPD's term on positive tokens added (TrOPD paper, Table 6)."""

from dataclasses import dataclass

from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import number

from .objective import Metrics
from .terms import log_ratio, policy_gradient
from .tropd import TrOPD


@dataclass(frozen=True, kw_only=True)
class TrOPDWithAOPD(TrOPD):
    """TrOPD - aopd_coef 1[R > 0] R l.

    The paper adds the two losses; literally (``aopd_coef`` 1, the default) that doubles the weight of positive tokens,
    which TrOPD trusts already.
    """

    name = "tropd_aopd"
    aopd_coef: float = number(1.0, at_least=0.0)

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        loss, metrics = super().token_loss(scores)
        return loss + self.aopd_coef * policy_gradient(scores, log_ratio(scores).clamp(min=0)), metrics
