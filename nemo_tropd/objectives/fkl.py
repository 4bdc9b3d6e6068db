"""Forward KL over the teacher's top k on the student's own states (TrOPD paper, Eq. 3, k = 64)."""

from dataclasses import dataclass

from torch import Tensor

from nemo_tropd.batch import TokenScores

from .objective import Metrics, Objective
from .terms import choice_of_tail, forward_kl


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Objective):
    """F_k, differentiated directly. With k = V it is the exact forward KL."""

    name = "fkl"
    tail: str = choice_of_tail()

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        value = forward_kl(scores, self.tail)
        return value, {"forward_kl": value}
