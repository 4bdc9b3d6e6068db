"""Rollouts of older weights, weighted: over all tokens of a vocabulary the gradient is that of the student's own."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from nemo_tropd import objectives
from nemo_tropd.batch import TokenScores

pytestmark = pytest.mark.random
VOCABULARY, TOP_K, NO_CAP = 9, 3, 1e30
NAMES = ["tropd", "opd", "topd", "fkl_outlier", "mask_outlier", "clip_outlier", "fkl", "jsd", "aopd", "tropd_aopd"]


class Tokens:
    """Every token after one context: by the student, by the older one that sampled, and by the teacher, fp64."""

    def __init__(self) -> None:
        self.logits = torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True)
        self.older = (self.logits.detach() + 0.7 * torch.randn(VOCABULARY, dtype=torch.float64)).log_softmax(0)
        self.teacher = (2 * torch.randn(VOCABULARY, dtype=torch.float64)).log_softmax(0)

    @property
    def student(self) -> Tensor:
        return self.logits.log_softmax(0)

    def gradient(self, objective: objectives.Objective, chance: Tensor) -> Tensor:
        """Of the expected loss where token x is sampled with probability ``chance[x]``; the gate's draw as well."""
        best, ids = self.teacher.topk(TOP_K)
        trust = (self.teacher - self.student.detach()).clamp(max=0).exp()
        total = torch.zeros_like(self.logits)
        # A Bernoulli gate is open below trust and shut above: one draw in the middle of each, with its share.
        for uniform, share in ((trust / 2, trust), ((1 + trust) / 2, 1 - trust)):
            scores = TokenScores(
                student_log_probs=self.student,
                teacher_log_probs=self.teacher,
                teacher_top_k_log_probs=best.expand(VOCABULARY, -1),
                student_top_k_log_probs=self.student[ids].expand(VOCABULARY, -1),
                uniforms=uniform,
                guided=torch.zeros(VOCABULARY, dtype=torch.bool),
                behavior_log_probs=self.older,
            )
            loss, _ = objective(scores)
            (gradient,) = torch.autograd.grad((chance.detach() * share * loss).sum(), self.logits)
            total += gradient
        return total


@pytest.mark.parametrize("name", NAMES)
def test_weights_make_older_samples_the_students_own(name: str) -> None:
    tokens = Tokens()
    own = tokens.gradient(objectives.build(name), tokens.student.exp())
    stale = tokens.gradient(objectives.build(name), tokens.older.exp())
    weighted = tokens.gradient(objectives.build(name, importance_cap=NO_CAP), tokens.older.exp())
    torch.testing.assert_close(weighted, own, rtol=1e-9, atol=1e-12)
    if name != "fkl":  # the same for every token
        assert (stale - own).abs().max() > 1e-6  # without weights it is another gradient


@pytest.mark.parametrize("name", NAMES)
def test_the_caps_bias_is_the_mass_that_it_takes_away(name: str) -> None:
    """Token x then counts min(pi_S(x), cap b(x)) instead of pi_S(x)."""
    tokens, cap = Tokens(), random.uniform(0.5, 1.5)
    capped = tokens.gradient(objectives.build(name, importance_cap=cap), tokens.older.exp())
    counted = torch.minimum(tokens.student, tokens.older + math.log(cap)).exp()
    torch.testing.assert_close(capped, tokens.gradient(objectives.build(name), counted), rtol=1e-9, atol=1e-12)
