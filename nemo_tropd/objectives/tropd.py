"""TrOPD: trust-region on-policy distillation (arXiv 2606.01249, Eqs. 5-9)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import choice, number

from .objective import Metrics, Objective
from .terms import choice_of_gate, choice_of_tail, forward_kl, log_ratio, policy_gradient, trust_gate


@dataclass(frozen=True, kw_only=True)
class TrOPD(Objective):
    """Student tokens: -M R l + (1 - M) O, M ~ Bernoulli(min(rho, 1)). Teacher-prefix tokens: -guidance_weight l.

    ``outlier`` chooses O: ``fkl`` F_k (the paper), ``mask`` 0, ``clip`` -max(R, tau) l. The paper gives no ``tau``; -3
    is this project's.
    """

    name = "tropd"
    guidance_weight: float | None = number(0.001, at_least=0.0, optional=True)
    gate: str = choice_of_gate()
    outlier: str = choice("fkl", "mask", "clip")
    tail: str = choice_of_tail()
    tau: float = number(-3.0)

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        ratio, trust = log_ratio(scores), trust_gate(scores, self.gate)
        metrics = {"trust": trust}
        if self.outlier == "fkl":
            outlier = metrics["forward_kl"] = forward_kl(scores, self.tail)
        elif self.outlier == "clip":
            outlier = policy_gradient(scores, ratio.clamp(min=self.tau))
        else:
            outlier = torch.zeros_like(ratio)
        metrics["outlier_loss"] = (1 - trust) * outlier
        return policy_gradient(scores, trust * ratio) + metrics["outlier_loss"], metrics
