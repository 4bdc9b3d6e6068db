"""OPD on the tokens where the student is least certain (TrOPD paper, Table 1, "Entropy OPD 20%")."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import number

from .objective import Metrics, Objective
from .terms import log_ratio, policy_gradient


@dataclass(frozen=True, kw_only=True)
class EntropyOPD(Objective):
    """-1[H_S > tau] R l; ``tau`` (nats) unless given is the ``quantile`` of H_S over the global batch (first pass)."""

    name = "entropy_opd"
    needs_student_entropy = True
    tau: float | None = number(None)
    quantile: float = number(0.8, at_least=0.0, at_most=1.0)

    @property
    def needs_first_pass(self) -> bool:
        return self.tau is None

    def statistic(self, scores: TokenScores) -> Tensor:
        self._check_needs(scores)
        assert scores.student_entropy is not None
        return scores.student_entropy

    def bind(self, statistics: Tensor, loss_tokens: int | None = None) -> Objective:
        return self._bound(tau=quantile(statistics, self.quantile))

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        if self.tau is None:
            remedy = "bind it to the global batch's entropies, or give a number"
            raise ValueError(f"objective 'entropy_opd' needs tau: {remedy}")
        assert scores.student_entropy is not None
        keep = (scores.student_entropy > self.tau).to(scores.student_log_probs.dtype)
        return policy_gradient(scores, keep * log_ratio(scores)), {"kept": keep}


def quantile(values: Tensor, q: float) -> float:
    """The q-quantile by linear interpolation, of any number of values; infinity for none."""
    if values.numel() == 0:
        return float("inf")
    ordered = values.detach().flatten().double().sort().values
    place = q * (ordered.numel() - 1)
    low, high = int(place), min(int(place) + 1, ordered.numel() - 1)
    return float(torch.lerp(ordered[low], ordered[high], place - low))
