"""Entropy-aware OPD: reverse KL everywhere, forward KL where the teacher is uncertain (EOPD, arXiv 2603.07079)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import choice, number

from .objective import Metrics, Objective, importance_ratio
from .terms import log_ratio


@dataclass(frozen=True, kw_only=True)
class EOPD(Objective):
    """-min(r R, clip(r, 1 - eps, 1 + eps) R) + alpha 1[H_T > tau] F~_k, with r = pi_S(x) / pi_old(x).

    F~_k has the teacher renormalised over V_k. ``tau`` in nats; the paper has k = 16; ``alpha`` 1 is this project's.
    ``old_policy`` "student": pi_old is pi_S itself, as in the one update that a batch has here: r = 1, the gradient
    that of -R l. "behavior": what the tokens were sampled with. An engine rounds otherwise than the trainer, and beyond
    ln(1 + eps) = 0.18 nats a token has no gradient: for several updates a batch, whose policies differ by more. Not
    with ``importance_cap``, which corrects for the behavior, too.
    """

    name = "eopd"
    needs_teacher_entropy = True
    tau: float = number(0.8)
    alpha: float = number(1.0, at_least=0.0)
    eps: float = number(0.2, above=0.0)
    old_policy: str = choice("student", "behavior")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.old_policy == "behavior" and self.importance_cap is not None:
            why = "old_policy 'behavior' and importance_cap correct for the same: set one of them alone"
            raise ValueError(f"objective 'eopd': {why}")

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        assert scores.teacher_entropy is not None
        reward, l = log_ratio(scores), scores.student_log_probs  # noqa: E741 (the paper's letter)
        ratio = torch.exp(l - l.detach())
        if self.old_policy == "behavior":
            ratio = ratio * importance_ratio(scores, what="'eopd' with old_policy 'behavior'")
        reverse = -torch.minimum(ratio * reward, ratio.clamp(1 - self.eps, 1 + self.eps) * reward)
        q = scores.teacher_top_k_log_probs.detach().log_softmax(-1)
        forward = (q.exp() * (q - scores.student_top_k_log_probs)).sum(-1)
        uncertain = (scores.teacher_entropy > self.tau).to(l.dtype)
        return reverse + self.alpha * uncertain * forward, {"forward_kl": forward, "uncertain": uncertain}
