"""The forward KL over the complete vocabulary."""

from dataclasses import dataclass

from torch import Tensor

from .exact import ExactObjective, times


@dataclass(frozen=True, kw_only=True)
class ExactForwardKL(ExactObjective):
    """KL(pi_T || pi_S), with gradient p - q: ``fkl`` with k = V, without its top k."""

    name = "fkl_exact"

    @property
    def kernel(self) -> tuple[str, float]:
        return "forward", 0.0

    def sums(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return times(log_q, log_q - log_p).sum(-1, keepdim=True)

    def value(self, sums: Tensor) -> Tensor:
        return sums[:, 0]

    def logit_gradient(self, log_p: Tensor, log_q: Tensor, sums: Tensor) -> Tensor:
        return log_p.exp().sub_(log_q.exp())
