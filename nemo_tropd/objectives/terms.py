"""The terms that objectives are made of, in the notation of the TrOPD paper (arXiv 2606.01249).

l = log pi_S(x), carries gradient          R = stopgrad(log pi_T(x) - log pi_S(x)),  rho = exp(R)
V_k = the teacher's top-k tokens           F_k = sum over V_k of pi_T (log pi_T - log pi_S)
"""

import torch
from torch import Tensor

from nemo_tropd.batch import TokenScores
from nemo_tropd.fields import choice

from .objective import log_ratio, trust_probability

__all__ = ["choice_of_gate", "choice_of_tail", "forward_kl", "log_ratio", "policy_gradient", "trust_gate"]


def choice_of_gate() -> str:
    """The dataclass field ``gate``; see ``trust_gate``."""
    return choice("bernoulli", "threshold", "soft")


def choice_of_tail() -> str:
    """The dataclass field ``tail``; see ``forward_kl``."""
    return choice("none", "ghost")


def policy_gradient(scores: TokenScores, reward: Tensor) -> Tensor:
    """-stopgrad(reward) l, [T].

    The reward must be detached: differentiating log(pi_S / pi_T) at the sampled token directly has expected gradient
    zero and never sees the teacher.
    """
    return -reward.detach() * scores.student_log_probs


def trust_gate(scores: TokenScores, gate: str) -> Tensor:
    """M, [T], detached: the weight with which the student's own sample is trusted.

    bernoulli  M ~ Bernoulli(min(rho, 1)), the paper's Eq. 6, by comparing with the token's uniform draw
    threshold  M = 1[rho >= 1]
    soft       M = min(rho, 1): the same expectation without the draw's variance
    """
    ratio = log_ratio(scores)
    if gate == "threshold":
        return (ratio >= 0).to(ratio.dtype)
    probability = trust_probability(ratio)
    return probability if gate == "soft" else (scores.uniforms < probability).to(ratio.dtype)


def forward_kl(scores: TokenScores, tail: str = "none") -> Tensor:
    """F_k, [T], nats, differentiated directly; its gradient over logits is m pi_S - pi_T 1[V_k], m = pi_T(V_k).

    Neither renormalised nor clamped: raw F_k may be negative, and clamping it at 0 kills its gradient. ``tail="ghost"``
    adds one bucket that holds the mass missing from V_k on both sides, (1 - m) log((1 - m) / (1 - m_S)), which makes it
    a divergence of the coarsened distributions, never negative beyond rounding.
    """
    teacher, student = scores.teacher_top_k_log_probs.detach(), scores.student_top_k_log_probs
    mass = teacher.exp()  # 0 where the teacher rules a token out, and 0 log 0 = 0
    value = torch.where(mass > 0, mass * (teacher - student), 0.0).sum(-1)
    if tail == "ghost":
        rest_teacher, rest_student = _log_rest(teacher), _log_rest(student)
        value = value + rest_teacher.exp() * (rest_teacher - rest_student)
    return value


def _log_rest(log_probs: Tensor) -> Tensor:
    """log(1 - sum exp(log_probs)) by log1mexp; mass within rounding of 1 counts as 1 - eps."""
    mass = log_probs.logsumexp(-1).clamp(max=-torch.finfo(log_probs.dtype).eps)
    # Two branches that are exact on their own side of log 2 (Maechler, "Accurately computing log(1 - exp(-|a|))").
    near, far = mass > -0.6931472, mass.clamp(max=-0.6931472)
    return torch.where(near, torch.log(-torch.expm1(mass)), torch.log1p(-far.exp()))
