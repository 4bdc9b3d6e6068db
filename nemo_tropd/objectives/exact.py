"""What objectives have in common that see both distributions in full, not only what was sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nemo_tropd.batch import TokenScores

from .objective import Metrics, Objective


@dataclass(frozen=True, kw_only=True)
class ExactObjective(Objective):
    """A function of p = pi_S and q = pi_T over the complete vocabulary at each token's state. Its gradient is the one
    that the sampled objective of the same name expects there; the sample decides only which states are visited.

    Three pure functions of one chunk of tokens and one shard of the vocabulary, all detached; log_p, log_q [C, V_local]
    are normalised over all shards:

        sums(log_p, log_q) -> [C, n]                          what is added up over the shards' tokens
        value(sums) -> [C]                                    the loss, from the sums over all shards
        logit_gradient(log_p, log_q, sums) -> [C, V_local]    the loss's gradient over the logits of log_p

    ``token_loss`` may combine the value (``TokenScores.exact``, through which that gradient flows) with columns of
    TokenScores. ``importance_cap`` still weights by the sampled token, as without a draw nothing would need.

    Here for those whose gradient is that of -sum over v of stopgrad(w_v) log p_v: they only say ``weights``.
    """

    needs_distributions: ClassVar[bool] = True

    @property
    def needs_top_k(self) -> bool:
        """Whether ``token_loss`` looks at the teacher's top k; else one candidate is enough."""
        return False

    @property
    def kernel(self) -> tuple[str, float] | None:
        """The formula of ``loss.kernels_exact`` that computes the same on a GPU, and its number; None: torch does."""
        return None

    def weights(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """w, [C, V_local]: p times the reward of each token."""
        raise NotImplementedError

    def sums(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self.weights(log_p, log_q).sum(-1, keepdim=True)

    def value(self, sums: Tensor) -> Tensor:
        return -sums[:, 0]

    def logit_gradient(self, log_p: Tensor, log_q: Tensor, sums: Tensor) -> Tensor:
        return (log_p.exp() * sums[:, :1]).sub_(self.weights(log_p, log_q))

    def token_loss(self, scores: TokenScores) -> tuple[Tensor, Metrics]:
        assert scores.exact is not None
        return scores.exact, {}


def times(log_p: Tensor, values: Tensor) -> Tensor:
    """p * values; 0 where p is 0, as p log p is in the limit. Overwrites ``values``."""
    p = log_p.exp()
    return values.mul_(p).masked_fill_(p == 0, 0.0)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share q + (1 - share) p); of two zeros, -inf."""
    stay = math.log1p(-share) if share < 1 else -math.inf
    return torch.logaddexp(log_q + math.log(share), log_p + stay)
