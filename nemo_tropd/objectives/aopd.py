"""AOPD: forward KL where the teacher likes the sample less than the student does (arXiv 2605.06387, Eq. 10)."""

from dataclasses import dataclass

from torch import Tensor

from nemo_tropd.batch import TokenScores

from .objective import Metrics, Objective
from .terms import choice_of_tail, forward_kl, log_ratio, policy_gradient


@dataclass(frozen=True, kw_only=True)
class AOPD(Objective):
    """G F_k - (1 - G) R l, G = 1[R <= 0]; averaged over each sequence, then over sequences."""

    name = "aopd"
    denominator = "sequences"
    tail: str = choice_of_tail()

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        ratio, outlier = log_ratio(scores), forward_kl(scores, self.tail)
        positive = (ratio > 0).to(ratio.dtype)
        loss = policy_gradient(scores, positive * ratio) + (1 - positive) * outlier
        return loss, {"trust": positive, "forward_kl": outlier, "outlier_loss": (1 - positive) * outlier}
