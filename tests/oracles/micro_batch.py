"""Random micro-batches for the head, and what plain float64 torch on the full vocabulary makes of them."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from nemo_tropd import objectives
from nemo_tropd.batch import PLAIN, LossTokens, Sampling, TeacherScores
from nemo_tropd.objectives import Objective

from .equations import EQUATIONS, World, entropy
from .sampling import near_a_cut, renormalised

POISON = 1e4

# Every objective, and each option that changes an equation.
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in EQUATIONS if name not in ("entropy_opd", "reopold_2stage")},
    # 0.77 of no T here is a whole number of tokens: the threshold falls between two of them, never on one.
    "entropy_opd": {"quantile": 0.77},
    "fkl:ghost": {"tail": "ghost"},
    "jsd:detached": {"beta": 0.3, "teacher_term": "detached"},
    "fkl_outlier:soft": {"gate": "soft", "tail": "ghost"},
    "tropd:threshold": {"gate": "threshold"},
    "tropd:mask": {"outlier": "mask", "guidance_weight": 0.5},
    "tropd:clip": {"outlier": "clip", "tau": -0.5, "gate": "soft"},
    "reopold:logit": {"floor": "logit"},
    "aopd:ghost": {"tail": "ghost"},
    "topd:one": {"alpha": 1.0},
    "topd:global": {"alpha": 0.4},
    "gopd:two": {"lambda_": 2.0},
    "tropd_aopd:half": {"aopd_coef": 0.5},
    "eopd:tight": {"tau": 1.5, "alpha": 0.3, "eps": 0.05, "old_policy": "behavior"},
    "reopold_2stage:1": {"beta": 0.23},
    "reopold_2stage:2": {"beta": 0.23},
}


@dataclass
class MicroBatch:
    """Full-vocabulary float64 tensors; the last ``padding`` rows of both weights hold poison."""

    hidden: Tensor  # [B, S, H]
    weight: Tensor  # [V + padding, H]
    teacher_hidden: Tensor  # [B, S, H']
    teacher_weight: Tensor  # [V + padding, H']
    reference: Tensor  # [T, V] log pi_ref
    tokens: LossTokens
    vocab_size: int
    k: int
    sampling: Sampling = PLAIN

    def teacher_log_probs(self) -> Tensor:
        rows = self.teacher_hidden.flatten(0, 1)[self.tokens.rows]
        return (rows @ self.teacher_weight[: self.vocab_size].t() / self.sampling.temperature).log_softmax(-1)

    def teacher_scores(self) -> TeacherScores:
        full = self.teacher_log_probs()
        top = full.topk(self.k, -1)
        own = full.gather(1, self.tokens.token_ids[:, None])[:, 0]
        return TeacherScores(own.float(), top.values.float(), top.indices, entropy(full).float())

    def world(self, hidden: Tensor, weight: Tensor) -> World:
        logits = hidden.flatten(0, 1)[self.tokens.rows] @ weight[: self.vocab_size].t()
        t = self.tokens
        return World(
            logits, self.teacher_log_probs(), t.token_ids, t.uniforms.double(), self.k, t.guided,
            t.behavior_log_probs.double(), self.reference, sampling=self.sampling,
        )  # fmt: skip


# Where some variant's equation jumps or has a kink: values of R, of the teacher's entropy and of pi_S / behavior.
JUMPS_OF_RATIO = (0.0, -0.5, -3.0, math.log(0.3) / 0.7, math.log(0.3 / 0.7))
JUMPS_OF_ENTROPY = (0.8, 1.5)
JUMPS_OF_IMPORTANCE = (0.8, 1.2, 0.95, 1.05)
# What fp32 may move a value by stays well below these, so fp32 and fp64 fall on the same side.
MARGIN, ENTROPY_GAP = 5e-5, 5e-6


def make(seed: int, **shape: Any) -> MicroBatch:
    """A micro-batch as ``_draw`` draws it, no token of which lies on a jump of an equation."""
    return deepcopy(_made(seed, **shape))


@lru_cache(maxsize=16)
def _made(seed: int, **shape: Any) -> MicroBatch:
    drawn = (_draw(seed + 10**7 * attempt, **shape) for attempt in count())
    return next(mb for mb in drawn if not _on_a_jump(mb))


def _on_a_jump(mb: MicroBatch) -> bool:
    world = mb.world(mb.hidden, mb.weight)
    importance = (world.likelihood - world.behavior).exp()
    student = entropy(world.student).sort().values
    near = [
        *((world.ratio - at).abs() < MARGIN for at in JUMPS_OF_RATIO),
        *((entropy(world.teacher) - at).abs() < MARGIN for at in JUMPS_OF_ENTROPY),
        *((importance - at).abs() < MARGIN for at in JUMPS_OF_IMPORTANCE),
        (world.u - world.ratio.exp()).abs() < MARGIN,
        student.diff() < ENTROPY_GAP,
        torch.tensor([near_a_cut(world.logits, mb.sampling, MARGIN)]),
    ]
    return any(bool(n.any()) for n in near)


def _draw(
    seed: int,
    *,
    batch: int = 3,
    length: int = 8,
    hidden: int = 16,
    vocab_size: int = 91,
    padding: int = 5,
    k: int = 7,
    fill: float = 0.7,
    sampling: Sampling = PLAIN,
) -> MicroBatch:
    """A micro-batch where about ``fill`` of the positions enter the loss, some of them guided."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).double()

    chosen = torch.rand(batch * length, generator=g) < fill
    rows = chosen.nonzero(as_tuple=True)[0]
    tokens_drawn = rows.numel()
    states, weight = normal(batch, length, hidden), normal(vocab_size + padding, hidden) * 0.5
    teacher_states, teacher_weight = normal(batch, length, hidden + 4), normal(vocab_size + padding, hidden + 4) * 0.5
    states.view(-1, hidden)[~chosen] = POISON
    weight[vocab_size:] = POISON
    teacher_weight[vocab_size:] = POISON
    logits = states.flatten(0, 1)[rows] @ weight[:vocab_size].t()
    student = logits.log_softmax(-1)
    teacher = (teacher_states.flatten(0, 1)[rows] @ teacher_weight[:vocab_size].t()).log_softmax(-1)
    # Half sampled from the student, half the teacher's favourite: trusted tokens, outliers and tokens in the top k.
    sampled = torch.multinomial(student.exp(), 1, generator=g)[:, 0] if tokens_drawn else rows
    x = torch.where(torch.rand(tokens_drawn, generator=g) < 0.5, sampled, teacher.argmax(-1))
    if tokens_drawn:
        x[0] = vocab_size - 1
    guided = torch.rand(tokens_drawn, generator=g) < 0.25
    own = renormalised(logits, x, guided, sampling)
    behavior = torch.where(guided, math.nan, own + 0.3 * normal(tokens_drawn))
    tokens = LossTokens(rows, x, guided, torch.rand(tokens_drawn, generator=g), behavior.float(), rows // length)
    reference = normal(tokens_drawn, vocab_size).log_softmax(-1)
    return MicroBatch(states, weight, teacher_states, teacher_weight, reference, tokens, vocab_size, k, sampling)


def objective_and_loss(variant: str, world: World) -> tuple[Objective, Tensor]:
    """The objective under test, bound where it needs a first pass, and the oracle's loss [T]."""
    name, _, option = variant.partition(":")
    params = dict(VARIANTS[variant])
    equation = EQUATIONS[name]
    h, r = entropy(world.student), world.ratio
    objective = objectives.build(name, **(params | ({"baseline": "global"} if option == "global" else {})))
    if name == "entropy_opd":
        world = replace(world, tau_entropy=_quantile(h, params.pop("quantile")))
        objective = objective.bind(h)
    elif name == "reopold_2stage":
        c = math.log(0.3) / 0.7
        tau = _quantile(h, 1 - params["beta"])
        kept = (r >= c).sum() if option == "1" else (h >= tau).sum()
        world = replace(world, tau_entropy=tau, mask_sum=max(float(kept), 1.0))
        objective = objective.at_step(0 if option == "1" else 100).bind(r if option == "1" else h)
        params = {"stage": int(option)}
    elif option == "global" and r.numel():
        rewards = torch.log(params["alpha"] * r.exp() + 1 - params["alpha"])
        world = replace(world, baseline=float(rewards.mean()))
        objective = objective.bind(rewards)
    elif option == "global":
        objective = objective.bind(r)
    return objective, equation(world, **params)


def _quantile(values: Tensor, q: float) -> float:
    return float(torch.quantile(values, q)) if values.numel() else math.inf
