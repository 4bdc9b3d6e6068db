"""G-OPD: a reward that may go beyond the teacher, measured from a reference model."""

from dataclasses import dataclass

from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import number

from .objective import Metrics, Objective
from .terms import policy_gradient


@dataclass(frozen=True, kw_only=True)
class GOPD(Objective):
    """-stopgrad(lambda log(pi_T / pi_ref) - log(pi_S / pi_ref)) l.
    Its expected gradient is that of KL(pi_S || pi_T^lambda pi_ref^(1 - lambda) / Z); lambda = 1 is OPD."""

    name = "gopd"
    needs_reference = True
    lambda_: float = number(1.25, at_least=0.0)

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        assert scores.reference_log_probs is not None
        reference = scores.reference_log_probs
        reward = self.lambda_ * (scores.teacher_log_probs - reference) - (scores.student_log_probs - reference)
        return policy_gradient(scores, reward), {"reward": reward}
