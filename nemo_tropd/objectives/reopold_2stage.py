"""REOPOLD in two stages: exploration by reward, then refinement by entropy (arXiv 2603.11137)."""

from dataclasses import dataclass

from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import integer, number

from .entropy_opd import quantile
from .objective import Metrics, Objective
from .reopold import REOPOLD
from .terms import log_ratio, policy_gradient


@dataclass(frozen=True, kw_only=True)
class REOPOLDTwoStage(REOPOLD):
    """-mask max(R, c) l, divided by the mask's sum over the global batch.

    Before ``switch_step`` mask = 1[R >= c]; from it on mask = 1[H_S >= tau_beta], tau_beta the (1 - beta) quantile of
    H_S over the global batch. Call ``at_step``, then ``bind`` with a first pass's statistic: R in stage 1, H_S in
    stage 2; it keeps the factor N / sum(mask) for losses scaled by 1 / N, the number of all loss tokens.
    ``switch_step`` 100 (half of the paper's 200 steps) and ``beta`` 0.2 are this project's.
    """

    name = "reopold_2stage"
    needs_student_entropy = True
    denominator = "mask"
    beta: float = number(0.2, above=0.0, at_most=1.0)
    switch_step: int = integer(100, at_least=0)
    step: int | None = integer(None, at_least=0)
    threshold: float | None = number(None)
    factor: float | None = number(None, at_least=0.0)

    @property
    def needs_first_pass(self) -> bool:
        return self.factor is None

    def at_step(self, step: int) -> Objective:
        return self._bound(step=step, threshold=None, factor=None)

    def statistic(self, scores: TokenScores) -> Tensor:
        self._check_needs(scores)
        if self._first_stage():
            return log_ratio(scores)
        assert scores.student_entropy is not None
        return scores.student_entropy.detach()

    def bind(self, statistics: Tensor, loss_tokens: int | None = None) -> Objective:
        threshold = self.c if self._first_stage() else quantile(statistics, 1 - self.beta)
        kept, tokens = int((statistics >= threshold).sum()), statistics.numel() if loss_tokens is None else loss_tokens
        return self._bound(threshold=threshold, factor=tokens / kept if kept else 0.0)

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        if self.threshold is None or self.factor is None:
            raise ValueError("objective 'reopold_2stage' is not bound: call at_step(step), then bind(statistics)")
        ratio = log_ratio(scores)
        keep = (self.statistic(scores) >= self.threshold).to(ratio.dtype)
        return self.factor * policy_gradient(scores, keep * ratio.clamp(min=self.c)), {"kept": keep}

    def _first_stage(self) -> bool:
        if self.step is None:
            raise ValueError("objective 'reopold_2stage' does not know its step: call at_step(step) first")
        return self.step < self.switch_step
