"""The loop's order, seen by a recording engine; a run killed between rollout and update; an engine on every rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.engine import Finished, RefreshStats, RolloutRequest
from tests.dist.run_distributed import DistributedFailure, run_distributed
from tests.doubles import GivenEngines, OnEveryRank, ReplayEngine
from tests.e2e.tiny_run import TinyRun, train_lines
from tests.tiny_models import make_tiny

VOCABULARY = 131
EXACT = ("loss", "grad_norm", "trust_fraction", "log_ratio_mean", "mismatch_mean_abs")
KEYS = {"trainer.tropd.max_steps": 4, "trainer.tropd.keep_checkpoints": 9, "model.data.held_out": 0}


class RecordingEngine(ReplayEngine):
    """Like an engine that sleeps: without weights after it, and dead on the spot where a test wants it."""

    def __init__(self, events: list[str], kill_at: int | None = None) -> None:
        super().__init__(VOCABULARY)
        self.events, self.kill_at, self.holds = events, kill_at, False

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        assert self.holds, "rollouts without a refresh"
        self.events.append(f"generate {self.version}")
        return super().generate(requests)

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        self.events.append(f"refresh {version}")
        self.holds = True
        return super().update_weights(stream, version)

    def sleep(self) -> bool:
        self.events.append("sleep")
        if self.version == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.holds = False
        return True


def run_here(rank: int, world_size: int, root: str, runs: list[tuple[str, int | None]]) -> list[list[str]]:
    """Train into each run directory, one after the other; what each run's engine, teacher and optimizer saw."""
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    from megatron.core.distributed import DistributedDataParallel

    from nemo_tropd.teacher.offload import WeightHome
    from nemo_tropd.training.optimizer import StudentOptimizer
    from nemo_tropd.training.run import train
    from tests.e2e.compose import compose_config

    events: list[str] = []

    def recorded(owner: Any, method: str, event: str) -> None:
        original = getattr(owner, method)

        def call(self: Any, *args: Any, **kw: Any) -> Any:
            events.append(event)
            return original(self, *args, **kw)

        setattr(owner, method, call)

    recorded(WeightHome, "come_back", "teacher back")
    recorded(WeightHome, "leave", "teacher away")
    recorded(StudentOptimizer, "step", "step")
    recorded(DistributedDataParallel, "zero_grad_buffer", "clear")
    tiny, seen = TinyRun.at(Path(root)), []
    for name, kill_at in runs:
        events.clear()
        keys = {**KEYS, "model.teacher.offload": True, "model.tropd.guidance.enabled": False}
        cfg = compose_config(tiny.overrides(Path(root) / name, **keys))
        train(cfg, GivenEngines(partial(RecordingEngine, events, kill_at)))
        seen.append(list(events))
    return seen


def figures(run_dir: Path) -> list[tuple[float, ...]]:
    by_step = {line["step"]: line for line in train_lines(run_dir)}
    return [tuple(by_step[s][k] for k in EXACT) for s in sorted(by_step)]


@pytest.mark.timeout(400)
def test_the_order_of_a_step_and_a_run_killed_between_rollout_and_update(tmp_path: Path) -> None:
    TinyRun.make(tmp_path)
    with pytest.raises(DistributedFailure):
        run_distributed(run_here, 1, str(tmp_path), [("killed", 2)], init_gloo=False)
    assert len(train_lines(tmp_path / "killed")) == 2  # the third step had its rollouts, and nothing more
    resumed, straight = run_distributed(
        run_here, 1, str(tmp_path), [("killed", None), ("straight", None)], init_gloo=False, timeout_s=350
    )[0]

    def one_step(step: int) -> list[str]:
        return [f"generate {step}", "sleep", "teacher back", "teacher away", "clear", "step", f"refresh {step + 1}"]

    loaded = ["teacher away"]
    assert straight == [*loaded, "refresh 0", *(event for step in range(4) for event in one_step(step))]
    assert resumed == [*loaded, "refresh 2", *(event for step in (2, 3) for event in one_step(step))]
    assert figures(tmp_path / "killed") == figures(tmp_path / "straight") and len(figures(tmp_path / "killed")) == 4
    ours, theirs = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("killed", "straight"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def every_rank(rank: int, world_size: int, root: str) -> list[str]:
    """What is wrong: the device's stream under tensor parallelism, and a run with an engine on each of two groups."""
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    from nemo_tropd.convert.families import read_shape
    from nemo_tropd.convert.hf_export import device_stream
    from nemo_tropd.convert.hf_import import load_hf
    from nemo_tropd.gpt.build import build_gpt
    from nemo_tropd.parallel.topology import Topology
    from nemo_tropd.rollout import placement
    from nemo_tropd.training import run
    from tests.e2e.compose import compose_config

    wrong = []
    for family in ("qwen3", "llama"):
        folder = Path(root) / family
        topology, shape = Topology.start(2), read_shape(folder)
        model = build_gpt(shape, topology)
        load_hf(model, folder, shape, topology)
        wanted = load_file(folder / "model.safetensors")
        got = {name: tensor.clone() for name, tensor in device_stream(model, shape, topology)}
        if got.keys() != wanted.keys():
            wrong.append(f"{family}: {sorted(got.keys() ^ wanted.keys())}")
        wrong += [
            f"{family}: {name}" for name in wanted.keys() & got.keys() if not torch.equal(got[name], wanted[name])
        ]
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    os.environ["WORLD_SIZE"] = str(world_size)
    tiny = TinyRun.at(Path(root))
    for name, place in (("one", "process"), ("each", "colocated")):
        placement.placement_of = lambda cfg, place=place, **_: place
        keys = {**KEYS, "trainer.tropd.max_steps": 2, "model.tropd.guidance.enabled": False}
        keys["+model.tropd.params.importance_cap"] = 0.5
        cfg = compose_config(tiny.overrides(Path(root) / name, data=2, **keys))
        events: list[str] = []
        run.train(cfg, GivenEngines(lambda: OnEveryRank(RecordingEngine(events))))
        expected = ["refresh 0", "generate 0", "sleep", "refresh 1", "generate 1", "sleep", "refresh 2"]
        if events != (expected if place == "colocated" or rank == 0 else []):
            wrong.append(f"{name}: {events}")
    return wrong


@pytest.mark.timeout(400)
def test_an_engine_on_every_rank_takes_the_steps_of_one_for_all(tmp_path: Path) -> None:
    TinyRun.make(tmp_path)
    make_tiny(tmp_path / "qwen3", "qwen3", tied=True)
    make_tiny(tmp_path / "llama", "llama", tied=False)
    assert run_distributed(every_rank, 2, str(tmp_path), timeout_s=350) == [[], []]
    assert figures(tmp_path / "each") == figures(tmp_path / "one") and len(figures(tmp_path / "each")) == 2
    assert all(0 < line["importance_weight"] <= 0.5 for line in train_lines(tmp_path / "each"))
