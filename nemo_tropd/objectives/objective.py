"""What every objective is: a pure function of one micro-batch's ``TokenScores``, with its parameters and its needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import number, refused

Metrics = dict[str, Tensor]
Denominator = Literal["tokens", "sequences", "mask"]


class ParameterError(ValueError):
    """A parameter of an objective has a value that it does not take; ``wanted`` says which it does."""

    def __init__(self, objective: str, parameter: str, value: object, wanted: str) -> None:
        self.parameter, self.value, self.wanted = parameter.rstrip("_"), value, wanted
        super().__init__(f"objective {objective!r}, parameter {self.parameter!r} is {value!r}; {wanted}")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A per-token loss: ``objective(scores) -> (loss [T], metrics: name -> [T])``. The loss is minimised.

    pi_S(x) of a student token is the probability with which it was sampled, whatever temperature, top-k and top-p; in
    sums over the teacher's top k, in H_S and for prefix tokens it is that of the complete softmax (see TokenScores).

    Shared parameters, both off by default:
        guidance_weight  tokens the teacher wrote get ``-guidance_weight * log pi_S(x)`` in place of the objective's own
                         loss (TrOPD, Eq. 9, has 0.001).
        importance_cap   multiply the loss of each student token by ``min(pi_S(x) / behavior(x), cap)``, detached: the
                         correction for rollouts of stale or mismatched weights; 1 where the behavior is NaN.

    Metrics always hold ``trust`` (the gate's weight; without a gate ``min(rho, 1)``) and ``log_ratio`` (R);
    ``forward_kl`` where the objective computes it. What a caller has to provide is declared as ``needs_*`` and
    ``denominator``:
        tokens     the sum over the global batch is divided by its number of loss tokens
        sequences  the mean over sequences of each sequence's mean: weight a token by N / (sequences * its length)
        mask       divided by the sum of the objective's mask; the objective rescales itself once it is bound
    """

    name: ClassVar[str] = ""
    needs_student_entropy: ClassVar[bool] = False
    needs_teacher_entropy: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_distributions: ClassVar[bool] = False  # see ExactObjective
    denominator: ClassVar[Denominator] = "tokens"

    guidance_weight: float | None = number(None, at_least=0.0)
    importance_cap: float | None = number(None, above=0.0)

    def __post_init__(self) -> None:
        for name, value, wanted in refused(self):
            raise ParameterError(self.name, name, value, wanted)

    @property
    def needs_first_pass(self) -> bool:
        """Whether ``bind`` must be called with a statistic of the global batch before the objective can be."""
        return False

    def at_step(self, step: int) -> Objective:
        """The objective for this training step (only ``reopold_2stage`` changes)."""
        return self

    def statistic(self, scores: TokenScores) -> Tensor:
        """[T]: what the first pass collects from every loss token of the global batch."""
        raise ValueError(f"objective {self.name!r} needs no first pass")

    def applies(self, scores: TokenScores) -> Tensor:
        """[T], bool: the tokens that have the objective's own loss; with a ``guidance_weight`` not the teacher's."""
        return torch.ones_like(scores.guided) if self.guidance_weight is None else ~scores.guided

    def bind(self, statistics: Tensor, loss_tokens: int | None = None) -> Objective:
        """The objective with its thresholds taken from ``statistics`` [N], those of the global batch's tokens that it
        ``applies`` to, of ``loss_tokens`` in all (default N), by which the caller divides the sum of losses."""
        raise ValueError(f"objective {self.name!r} needs no first pass")

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        """The objective's own equation: loss [T] and its metrics."""
        raise NotImplementedError

    def __call__(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        self._check_needs(scores)
        loss, own = self.token_loss(scores)
        ratio = log_ratio(scores)
        metrics = {"trust": trust_probability(ratio), "log_ratio": ratio, **own}
        if self.importance_cap is not None:
            weight = importance_ratio(scores, what=f"{self.name!r} with importance_cap").clamp(max=self.importance_cap)
            loss, metrics["importance_weight"] = weight * loss, weight
        if self.guidance_weight is not None:
            loss = torch.where(scores.guided, -self.guidance_weight * scores.student_log_probs, loss)
        return loss, {name: values.detach() for name, values in metrics.items()}

    def _check_needs(self, scores: TokenScores) -> None:
        wanted = {"student_entropy": self.needs_student_entropy, "teacher_entropy": self.needs_teacher_entropy}
        wanted |= {"reference_log_probs": self.needs_reference, "exact": self.needs_distributions}
        if missing := [name for name, needed in wanted.items() if needed and getattr(scores, name) is None]:
            raise ValueError(f"objective {self.name!r} needs TokenScores.{', '.join(missing)}, which is None")

    def _bound(self, **values: Any) -> Objective:
        return replace(self, **values)


def log_ratio(scores: TokenScores) -> Tensor:
    """R = stopgrad(log pi_T(x) - log pi_S(x)), [T]."""
    return (scores.teacher_log_probs - scores.student_log_probs).detach()


def trust_probability(ratio: Tensor) -> Tensor:
    """min(rho, 1) = exp(min(R, 0)): no overflow, however far the teacher is above the student."""
    return ratio.clamp(max=0).exp()


def importance_ratio(scores: TokenScores, *, what: str) -> Tensor:
    """Detached pi_S(x) / behavior(x), [T]; 1 where the behavior is NaN."""
    if scores.behavior_log_probs is None:
        raise ValueError(f"objective {what} needs TokenScores.behavior_log_probs, which is None")
    gap = scores.student_log_probs.detach() - scores.behavior_log_probs.detach()
    return gap.nan_to_num(nan=0.0).exp()
