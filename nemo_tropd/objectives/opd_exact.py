"""The reverse KL over the complete vocabulary."""

from dataclasses import dataclass

from torch import Tensor

from .exact import ExactObjective, times


@dataclass(frozen=True, kw_only=True)
class ExactOPD(ExactObjective):
    """KL(pi_S || pi_T), whose gradient OPD's sample estimates: p (log(p / q) - KL). Infinite where the teacher rules a
    token out that the student does not: such a step is skipped like any that is not finite. ``tropd_exact`` is not."""

    name = "opd_exact"

    @property
    def kernel(self) -> tuple[str, float]:
        return "reverse", 0.0

    def weights(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return times(log_p, log_q - log_p)
