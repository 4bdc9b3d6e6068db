"""Jensen-Shannon divergence with weight beta (TrOPD paper, Eq. 4, beta = 0.5)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import choice, number

from .objective import Metrics, Objective
from .terms import policy_gradient


@dataclass(frozen=True, kw_only=True)
class JSD(Objective):
    """beta sum over V_k of pi_T log(pi_T / pi_M) - (1 - beta) stopgrad(log pi_M(x) - log pi_S(x)) l,
    with pi_M = beta pi_T + (1 - beta) pi_S.

    The second term's expected gradient is already that of JSD_beta, so the paper's literal sum, the default, counts the
    first term's twice. ``teacher_term="detached"`` keeps the value and takes the second term's gradient alone.
    """

    name = "jsd"
    beta: float = number(0.5, above=0.0, below=1.0)
    teacher_term: str = choice("differentiated", "detached")

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        teacher = scores.teacher_top_k_log_probs.detach()
        first = (teacher.exp() * (teacher - self._mixture(teacher, scores.student_top_k_log_probs))).sum(-1)
        if self.teacher_term == "detached":
            first = first.detach()
        student = scores.student_log_probs.detach()
        reward = self._mixture(scores.teacher_log_probs, student) - student
        return self.beta * first + (1 - self.beta) * policy_gradient(scores, reward), {}

    def _mixture(self, teacher: Tensor, student: Tensor) -> Tensor:
        return torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))
