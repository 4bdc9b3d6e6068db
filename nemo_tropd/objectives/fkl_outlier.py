"""The trust gate with a forward KL on outliers (TrOPD paper, Eqs. 5-7)."""

from dataclasses import dataclass

from torch import Tensor

from nemo_tropd.batch import TokenScores

from .objective import Metrics, Objective
from .terms import choice_of_gate, choice_of_tail, forward_kl, log_ratio, policy_gradient, trust_gate


@dataclass(frozen=True, kw_only=True)
class FKLOutlier(Objective):
    """-M R l + (1 - M) F_k, M ~ Bernoulli(min(rho, 1)), so that E[M] = 1 - TV(pi_S, pi_T)."""

    name = "fkl_outlier"
    gate: str = choice_of_gate()
    tail: str = choice_of_tail()

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        trust, outlier = trust_gate(scores, self.gate), forward_kl(scores, self.tail)
        loss = policy_gradient(scores, trust * log_ratio(scores)) + (1 - trust) * outlier
        return loss, {"trust": trust, "forward_kl": outlier, "outlier_loss": (1 - trust) * outlier}
