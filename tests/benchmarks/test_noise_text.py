"""The noise of gradients on text: the estimate, and the gradients it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.benchmarks.objectives.gradients import Gradients
from examples.benchmarks.objectives.noise_text import Pair
from nemo_tropd import objectives
from nemo_tropd.batch import LossTokens
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.random


def test_noise_and_signal_are_unbiased() -> None:
    """Batches around a mean of known length: noise^2 2.5 in each of 40 places, signal^2 160."""
    found = []
    for _ in range(300):
        sums = Gradients()
        for _ in range(6):
            sums.add([2 + 2.5**0.5 * torch.randn(30), -2 + 2.5**0.5 * torch.randn(2, 5)])
        ratio, signal = sums.noise_to_signal()
        found.append((ratio * signal, signal))
    noise, signal = torch.tensor(found).mean(0).tolist()
    assert noise == pytest.approx(100, abs=3) and signal == pytest.approx(160, abs=8)  # 6 and 5 standard errors


def test_gradients_are_those_of_the_divergence(tmp_path: Path) -> None:
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path / name), dtype=torch.float32).eval()
        for name in ("student", "teacher")
    )
    teacher.requires_grad_(False)
    vocabulary = student.config.vocab_size
    ids, mask = torch.randint(0, vocabulary, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    rows = torch.tensor([4, 5, 9 + 3, 9 + 4, 9 + 7])
    tokens = LossTokens(
        rows=rows, token_ids=ids.flatten()[rows + 1], guided=torch.zeros(5, dtype=torch.bool), uniforms=torch.rand(5),
        behavior_log_probs=torch.full((5,), torch.nan), sequence=rows // 9,
    )  # fmt: skip
    built = [objectives.build("opd_exact"), objectives.build("fkl_exact")]
    found = list(Pair(student, teacher, None).gradients((ids, mask, tokens), built))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    ours, theirs = (m(**given).logits.flatten(0, 1)[rows].double().log_softmax(-1) for m in (student, teacher))
    reverse, forward = (ours.exp() * (ours - theirs)).sum(-1).mean(), (theirs.exp() * (theirs - ours)).sum(-1).mean()
    for loss, gradients in zip((reverse, forward), found, strict=True):
        for expected, gradient in zip(
            torch.autograd.grad(loss, list(student.parameters()), retain_graph=True), gradients, strict=True
        ):
            torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=2e-5 * float(expected.abs().max()) + 1e-7)
