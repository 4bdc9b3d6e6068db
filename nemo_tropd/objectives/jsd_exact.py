"""Jensen-Shannon divergence with weight beta, over the complete vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_tropd.fields import number

from .exact import ExactObjective, log_mixture, times


@dataclass(frozen=True, kw_only=True)
class ExactJSD(ExactObjective):
    """beta KL(q || M) + (1 - beta) KL(p || M), M = beta q + (1 - beta) p. What flows through M cancels, so the gradient
    is (1 - beta) p (log(p / M) - KL(p || M)): that of ``jsd`` with ``teacher_term="detached"`` and without its draw."""

    name = "jsd_exact"
    beta: float = number(0.5, above=0.0, below=1.0)

    @property
    def kernel(self) -> tuple[str, float]:
        return "jsd", self.beta

    def weights(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return times(log_p, log_mixture(log_p, log_q, self.beta).sub_(log_p)).mul_(1 - self.beta)

    def sums(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        teacher = times(log_q, log_q - log_mixture(log_p, log_q, self.beta)).sum(-1)
        return torch.stack([self.weights(log_p, log_q).sum(-1), teacher], 1)

    def value(self, sums: Tensor) -> Tensor:
        return self.beta * sums[:, 1] - sums[:, 0]
