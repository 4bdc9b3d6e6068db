"""The teacher's engines on GPUs, by what a run asks of them: memory, devices, graphs, prompts at a time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_tropd.config import TropdConfig
from nemo_tropd.config_teacher import DEFAULT_TEACHER
from nemo_tropd.parallel.agreement import World
from nemo_tropd.planner.machine import GIB
from nemo_tropd.planner.teacher_engines import TeacherEngines
from nemo_tropd.rollout.placement import EngineFactory
from nemo_tropd.training import run
from nemo_tropd.training.teacher_responses import TeacherResponses, generate_teacher_responses
from tests.doubles import replay_engines
from tests.e2e.compose import compose_config
from tests.e2e.tiny_run import TinyRun


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TropdConfig:
    """Of a node with eight GPUs of 79 GiB."""
    for name in ("WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    tiny = TinyRun.make(tmp_path)
    composed = compose_config(tiny.overrides(tmp_path / "run", data=8, **{"model.global_batch_size": 16}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * GIB, 79 * GIB))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    return composed


def engines_of(cfg: TropdConfig, engines: TeacherEngines, monkeypatch: pytest.MonkeyPatch) -> EngineFactory:
    """The engines that a run makes whose plan has ``engines`` for the teacher."""
    made: list[EngineFactory] = []
    teachers = (SimpleNamespace(path=cfg.model.teacher.path, engines=engines),)
    plan = SimpleNamespace(teachers=teachers, end_ids=(3,), vocab_size=131)
    monkeypatch.setattr(run, "_checked_plan", lambda _: plan)
    monkeypatch.setattr(run, "_with_plan", lambda cfg, plan, engines, call: made.append(engines))
    run.train(cfg)
    return made[0]


def test_the_teacher_has_a_nodes_gpus_to_itself(cfg: TropdConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the rollouts' share of them and their degree of 1, with which a large teacher would not start."""
    cfg.model.rollout.gpu_memory_utilization = 0.3
    engine: Any = engines_of(cfg, TeacherEngines(2, 4), monkeypatch).teacher(cfg)
    assert engine.devices == ("0,1,2,3", "4,5,6,7") and engine.queue
    arguments = engine.settings.llm_arguments()
    assert (arguments["gpu_memory_utilization"], arguments["tensor_parallel_size"]) == (0.9, 4)
    assert arguments["max_num_seqs"] == 256 and arguments["enforce_eager"] is False
    assert arguments["compilation_config"]["cudagraph_mode"] == "FULL_DECODE_ONLY"
    assert "kv_cache_memory_bytes" not in arguments and not engine.settings.refreshable
    assert engines_of(cfg, TeacherEngines(8, 1), monkeypatch).teacher(cfg).devices == tuple("01234567")


def test_all_devices_are_asked_at_once(cfg: TropdConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch ends with its longest response, for which the others' devices wait: few batches, of many prompts."""
    asked: list[int] = []
    monkeypatch.setattr(TeacherResponses, "ensure", lambda self, prompts, make, *, batch, **_: asked.append(batch))
    generate_teacher_responses(cfg, {DEFAULT_TEACHER: {(1, 2): 4}}, World(), replay_engines(131), 131)
    assert asked == [1024 * 8]
