"""States whose every token is a sample, weighted by its probability: the head's mean gradient against closed forms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nemo_tropd import objectives
from nemo_tropd.batch import LossTokens, Sampling, TeacherScores
from nemo_tropd.loss.head import LossOptions, head_loss
from nemo_tropd.loss.inputs import HeadLayout

from .sampling import distribution, expected

VOCABULARY, PADDING, HIDDEN, K, STATES = 29, 3, 8, 6, 3
LAST = 1 - 2.0**-24  # the largest draw: it trusts only where the teacher's probability is at least the student's


def check_states(
    seed: int, sampling: Sampling, dtype: torch.dtype, tolerance: float, group: Any = None, rank: int = 0, size: int = 1
) -> Iterator[str]:
    """What differs: value and both gradients of opd, of tropd with a soft and with a drawn gate, and of prefixes."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, STATES, HIDDEN, generator=g).double()
    weight = torch.randn(VOCABULARY + PADDING, HIDDEN, generator=g).double()
    weight[VOCABULARY:] = 1e4
    teacher = 2 * torch.randn(STATES, VOCABULARY, generator=g).double()
    for name in ("opd", "soft", "bernoulli", "prefix"):
        h, w = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)
        logits = h[0] @ w[:VOCABULARY].t()
        kind = {"opd": "opd", "prefix": "prefix"}.get(name, "tropd")
        pairs = [expected(kind, z.detach(), t, K, sampling) for z, t in zip(logits, teacher, strict=True)]
        logits.backward(torch.stack([slope for _, slope in pairs]))
        want = torch.stack([value for value, _ in pairs])
        tokens, scores, weights = _every_sample(name, logits.detach(), teacher, sampling)
        states = tokens.rows
        gate = "bernoulli" if name == "bernoulli" else "soft"
        objective = objectives.build("tropd", gate=gate, guidance_weight=1.0)
        h2 = hidden[:, tokens.rows].to(dtype).requires_grad_(True)  # a row for every sample
        tokens = replace(tokens, rows=torch.arange(len(tokens)))
        w2 = weight.chunk(size, 0)[rank].to(dtype).clone().requires_grad_(True)
        out = head_loss(
            h2, w2, tokens, scores, objectives.build("opd") if name == "opd" else objective,
            HeadLayout(VOCABULARY, group, chunk_tokens=37, sampling=sampling), scale=1.0,
            options=LossOptions(token_weights=weights),
        )  # fmt: skip
        out.loss.backward()
        assert h2.grad is not None and w2.grad is not None and h.grad is not None and w.grad is not None
        for what, got, right, of in (
            ("value", out.loss, want.sum(), want.abs().sum()),
            ("hidden", torch.zeros_like(h[0]).index_add(0, states, h2.grad[0].double()), h.grad[0], h.grad.norm()),
            ("weight", w2.grad, w.grad.chunk(size, 0)[rank], w.grad.norm()),
        ):
            error = float((got.detach().double() - right.detach()).norm() / of.detach().clamp(min=1e-3))
            if not error < tolerance:
                yield f"{name}: {what} is off by {error:.2e}"


def _every_sample(
    name: str, logits: Tensor, teacher: Tensor, sampling: Sampling
) -> tuple[LossTokens, TeacherScores, Tensor]:
    """Loss tokens, their teacher scores and probabilities: every token of every state, per outcome of the gate."""
    pi = (teacher / sampling.temperature).log_softmax(-1)
    q = torch.stack([distribution(z, sampling) for z in logits])
    trust = torch.where(q > 0, (pi - q.clamp(min=1e-300).log()).clamp(max=0).exp(), 1.0)
    outcomes = [(0.0, pi.exp() if name == "prefix" else q)]
    if name == "bernoulli":
        outcomes = [(0.0, q * trust), (LAST, q * (1 - trust))]
    states = torch.arange(STATES)[:, None].expand(STATES, VOCABULARY).flatten()
    ids = torch.arange(VOCABULARY).expand(STATES, VOCABULARY).flatten()
    count = len(outcomes)
    rows, token_ids = states.repeat(count), ids.repeat(count)
    uniforms = torch.cat([torch.full((len(ids),), u) for u, _ in outcomes])
    weights = torch.cat([weight.flatten() for _, weight in outcomes])
    guided = torch.full_like(rows, name == "prefix", dtype=torch.bool)
    tokens = LossTokens(rows, token_ids, guided, uniforms, torch.full((len(rows),), torch.nan), torch.zeros_like(rows))
    top = pi.topk(K)
    return tokens, TeacherScores(pi[rows, token_ids], top.values[rows], top.indices[rows]), weights
