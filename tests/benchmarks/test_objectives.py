"""The small comparison: its task, its models, its runs, and that an interrupted one goes on."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from examples.benchmarks.objectives import compare as module
from examples.benchmarks.objectives.figure import families_of
from examples.benchmarks.objectives.running_sums import (
    DIGITS,
    OBJECTIVE_NAMES,
    PROMPT,
    DigitModel,
    Models,
    distill,
    generate,
    loss_tokens,
    random_digits,
    running_sums,
    sequence,
    wrong_rule,
)  # fmt: skip

pytestmark = pytest.mark.random


def test_each_objective_that_ran_is_in_the_figure_and_no_family_is_its_baseline_alone() -> None:
    assert families_of(["opd", "opd_exact", "fkl_outlier"]) == {
        "complete distributions": ["opd", "opd_exact"],
        "without prefixes": ["fkl_outlier"],
        "forward KL": ["fkl_outlier"],
    }
    assert families_of(["fkl_outlier", "fkl_outlier:exact", "opd"]).keys() == {
        "without prefixes", "reward clipped or masked", "other targets", "complete distributions",
    }  # fmt: skip
    for _ in range(50):
        names = random.sample(OBJECTIVE_NAMES, random.randint(1, 9))
        shown = {n for members in families_of(names).values() for n in members}
        assert shown | {"tropd"} >= set(names) and shown <= set(names)  # tropd stands in every row


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation takes most of a short run."""
    monkeypatch.setattr("examples.benchmarks.objectives.running_sums.MEASURED", 16)
    monkeypatch.setattr("examples.benchmarks.objectives.running_sums.BATCH", 16)


@pytest.fixture
def models() -> Models:
    return Models(DigitModel(64).state_dict(), DigitModel(48).state_dict())


def test_the_task() -> None:
    generator = torch.Generator().manual_seed(random.randrange(1000))
    digits = random_digits(500, generator)
    assert running_sums(torch.tensor([[7, 5, 9]])).tolist() == [[7, 2, 1]]
    right = (wrong_rule(digits, generator) == running_sums(digits)).all(1).float().mean()
    assert 0.15 < right < 0.35


def test_cached_states_are_the_whole_sequences(models: Models) -> None:
    teacher, student = models.build()
    digits = random_digits(6, torch.Generator().manual_seed(2))
    with torch.no_grad():
        answer = generate(student, digits, None, teacher, torch.tensor([0, 0, 3, 3, 12, 12]))
        ids = sequence(digits, answer)
        for model, mine in ((student, [0, 1]), (teacher, [4, 5])):
            logits = model(ids[mine, :-1])[:, PROMPT - 1 :] @ model.head.t()
            assert torch.equal(logits.argmax(-1), answer[mine])


def test_labels_and_outputs_are_aligned() -> None:
    answer = torch.randint(0, 10, (3, DIGITS))
    tokens = loss_tokens(answer, torch.tensor([0, 4, 12]), step=5, seed=1)
    ids = sequence(torch.randint(0, 10, (3, DIGITS)), answer)
    assert torch.equal(ids[:, 1:].flatten()[tokens.rows], tokens.token_ids)
    assert tokens.guided.view(3, -1).sum(1).tolist() == [0, 4, 12]
    assert not torch.equal(tokens.uniforms, loss_tokens(answer, torch.zeros(3), step=6, seed=1).uniforms)


@pytest.mark.parametrize("name", OBJECTIVE_NAMES)
def test_every_objective_runs(name: str, models: Models) -> None:
    curve = distill(name, seed=0, steps=2, models=models)
    for values in (curve.gradient_norm, curve.trust, curve.reverse_kl, curve.one_minus_tv):
        assert len(values) == 2 and all(math.isfinite(v) for v in values)
    assert curve.gradient_norm[0] > 0 and 0 <= curve.trust[0] <= 1
    assert curve.accuracy_steps == [0, 2]


def test_runs_are_repeatable(models: Models) -> None:
    assert distill("tropd", 3, 2, models) == distill("tropd", 3, 2, models)
    assert distill("tropd", 3, 2, models) != distill("tropd", 4, 2, models)


def test_an_interrupted_comparison_goes_on(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    monkeypatch.setattr(module, "prepare", lambda say: calls.append(1) or models)
    first = module.compare(["opd"], seeds=1, steps=2, out=tmp_path, processes=1)
    assert len(calls) == 1
    again = module.compare(["opd"], seeds=1, steps=2, out=tmp_path)
    assert len(calls) == 1  # nothing was left to train
    for a, b in zip(first, again, strict=True):
        assert a.reverse_kl == pytest.approx(b.reverse_kl, rel=1e-4)
    assert (tmp_path / "compare_objectives.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "compare_objectives.md").read_text().count("| opd |") == 1
    with pytest.raises(ValueError, match="unknown objective trodp; known: opd"):
        module.compare(["trodp"], seeds=1, steps=2, out=tmp_path)
