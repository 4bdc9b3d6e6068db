"""TOP-D without its draw: the reverse KL to a proximal teacher, over the complete vocabulary."""

from dataclasses import dataclass

from torch import Tensor

from nemo_tropd.fields import number

from .exact import ExactObjective, log_mixture, times


@dataclass(frozen=True, kw_only=True)
class ExactTOPD(ExactObjective):
    """KL(pi_S || alpha pi_T + (1 - alpha) pi_S), the mixture detached; alpha = 1 is ``opd_exact``. A baseline would
    change nothing: it has no expected gradient."""

    name = "topd_exact"
    alpha: float = number(0.2, above=0.0, at_most=1.0)

    @property
    def kernel(self) -> tuple[str, float]:
        return "proximal", self.alpha

    def weights(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return times(log_p, log_mixture(log_p, log_q, self.alpha).sub_(log_p))
