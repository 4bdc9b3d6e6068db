"""An FP8 teacher in the model of a run, its layers emulated: measured on held-out prompts, kept or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from examples.benchmarks.fp8.emulation import EmulatedScorer
from nemo_tropd import objectives
from nemo_tropd.batch import TokenBatch
from nemo_tropd.config import ConfigError, ModelConfig, TropdConfig
from nemo_tropd.data import Prompt, PromptSet
from nemo_tropd.model import tropd_model
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.teacher.scorer import TeacherScorer
from nemo_tropd.training.calibration import calibration_batches
from nemo_tropd.training.packing import Packer
from nemo_tropd.training.setup import Setup
from tests.tiny_models import make_tiny

VOCABULARY, HELD_OUT = 131, 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("fp8_run")
    return make_tiny(folder / "student", layers=2, seed=1), make_tiny(folder / "teacher", layers=4, seed=2)


class Responses:
    """A double of the cache of teacher responses: as many tokens as the prompt's number."""

    def lookup(self, prompt_ids: Any) -> Any:
        length = 3 + int(prompt_ids[0])
        return type("Response", (), {"response_ids": [(7 * i + length) % VOCABULARY for i in range(length)]})


def held_out() -> PromptSet:
    return PromptSet(tuple(Prompt(str(i), "", (), None, (i, 5, 9), "here") for i in range(HELD_OUT)))


def settings(teacher: Path, **admission: Any) -> ModelConfig:
    cfg = ModelConfig(micro_batch_size=2)
    cfg.teacher.path, cfg.teacher.fp8, cfg.teacher.offload = str(teacher), "tensorwise", True
    cfg.data.path = "unused"
    cfg.rollout.samples_per_prompt = 1
    for key, value in admission.items():
        setattr(cfg.teacher.admission, key, value)
    return cfg


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    def scorer(source: Path, *, fp8: Any = None, offload: bool = False, fill: Any = None, **options: Any) -> Any:
        if fp8 is None:
            return TeacherScorer(source, offload=offload, **options)
        made = EmulatedScorer(source, fp8=fp8, **options)
        return made

    monkeypatch.setattr(tropd_model, "TeacherScorer", scorer)


def build(cfg: ModelConfig, student: Path, topology: Topology, calibration: Any) -> tropd_model.MegatronTrOPDModel:
    return tropd_model.MegatronTrOPDModel(
        OmegaConf.structured(cfg),
        None,
        topology=topology,
        objective=objectives.build("tropd"),
        student=tropd_model.StudentSource(student, "bf16", VOCABULARY),
        calibration=calibration,
    )


def calibration(cfg: ModelConfig, topology: Topology) -> list[TokenBatch]:
    packer = Packer(topology, 0, cfg.micro_batch_size, cfg.tokens_per_micro_batch, cfg.seed)
    return calibration_batches(cfg, held_out(), {"default": Responses()}, packer)


def test_calibration_takes_the_first_held_out_prompts_with_the_teachers_answers(
    models: tuple[Path, Path], topology: Topology
) -> None:
    cfg = settings(models[1], prompts=3)
    batches = calibration(cfg, topology)
    assert sum(b.count_loss_tokens for b in batches) == 3 + 4 + 5
    assert len(batches) == 2  # micro-batches of two
    cfg.teacher.fp8 = None
    assert calibration(cfg, topology) == []


def test_calibration_is_laid_out_as_the_run_is(models: tuple[Path, Path], topology: Topology) -> None:
    """Rows of concatenated sequences, if the run's steps are; all of them on every data-parallel rank."""
    cfg = settings(models[1])
    cfg.tokens_per_micro_batch = 24
    plan = SimpleNamespace(pad_id=0)
    place = replace(topology, data_rank=1, data_size=2)
    setup = Setup(TropdConfig(model=cfg), plan, place)
    batches = calibration_batches(cfg, held_out(), {"default": Responses()}, setup.packer())
    assert all(b.segments is not None and b.input_ids.shape[0] == 1 and b.input_ids.size(1) <= 24 for b in batches)
    assert sorted(r.sequence_id for b in batches for r in b.rollouts) == list(range(HELD_OUT))
    assert sum(b.count_loss_tokens for b in batches) == 3 + 4 + 5 + 6 + 7


def test_a_run_keeps_an_admitted_teacher(
    models: tuple[Path, Path], topology: Topology, emulated: None, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = settings(models[1], top_k_kl=5.0, gate_flips=1.0, ratio_error=5.0)
    batches = calibration(cfg, topology)
    model = build(cfg, models[0], topology, batches)
    assert isinstance(model.teacher, EmulatedScorer)
    assert f"FP8 teacher (tensorwise) against bf16 on {3 + 4 + 5 + 6 + 7} tokens" in capsys.readouterr().out
    (first, *_) = model.score(batches)
    assert first is not None and bool(torch.isfinite(first.log_probs).all())


def test_a_run_ends_if_a_bound_is_exceeded(models: tuple[Path, Path], topology: Topology, emulated: None) -> None:
    cfg = settings(models[1], ratio_error=1e-6)
    batches = calibration(cfg, topology)
    with pytest.raises(ConfigError, match=r"error of R [\d.]+ is above model\.teacher\.admission\.ratio_error = 1e-06"):
        build(cfg, models[0], topology, batches)


def test_an_fp8_teacher_is_not_taken_unmeasured_by_accident(
    models: tuple[Path, Path], topology: Topology, emulated: None
) -> None:
    with pytest.raises(ValueError, match="needs calibration batches"):
        build(settings(models[1]), models[0], topology, ())
    assert isinstance(build(settings(models[1], prompts=0), models[0], topology, ()).teacher, EmulatedScorer)
