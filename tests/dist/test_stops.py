"""A request to stop, in every phase of a run, on one rank of two: no finished step is lost, and the run resumes."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.engine import Abandoned, Finished, RefreshStats, RolloutRequest, Wanted
from tests import faults
from tests.dist.run_distributed import run_distributed
from tests.doubles import GivenEngines, ReplayEngine, replay_engines
from tests.e2e.tiny_run import TinyRun, train_lines

STEPS = 2
EXACT = ("loss", "grad_norm", "trust_fraction", "log_ratio_mean")
KEYS = {
    "trainer.tropd.max_steps": STEPS,
    "trainer.tropd.val_check_interval": 1,
    "trainer.tropd.save_interval": 9,  # what a stop saves is saved by nothing else
}
RANK_0 = ("responses", "engine start", "rollout", "refresh", "log", "report")
# Phase, which of its occurrences, and the step whose checkpoint the stop must leave behind (0: none yet).
CASES = [
    ("plan", 1, 0),
    ("responses", 1, 0),
    ("load", 1, 0),
    ("engine start", 1, 0),
    ("validation", 1, 0),
    ("rollout", 3, 1),
    ("pack", 3, 1),
    ("pack that takes long", 6, 1),
    ("teacher", 1, 1),
    ("teacher that takes long", 2, 1),
    ("student", 2, 2),
    ("student that takes long", 2, 2),
    ("optimizer", 1, 1),
    ("refresh", 2, 1),
    ("log", 2, 1),
    ("save", 1, 2),
    ("export", 1, 2),
    ("report", 1, 2),
    ("rollout that takes for ever", 5, 1),
]
STRAIGHT = "plan that nothing stops"
FINISH_S = 3.0  # long enough for the rest of a step on a busy machine
PER_RUN = 6  # of the cases, other ones in every run: two runs each take seconds


def stop_in_each(rank: int, world_size: int, root: str, cases: list[tuple[str, int, int]], guilty: int) -> list[Any]:
    """For each case: seconds from the signal to the end, the steps done, and the checkpoints; then resume the run."""
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    from nemo_tropd.parallel import signals
    from nemo_tropd.training.run import train
    from tests.e2e.compose import compose_config

    signals.FINISH_S = FINISH_S
    tiny, found = TinyRun.at(Path(root)), []
    for name in (phase for phase in faults.PHASES if phase != "plan"):
        __import__(faults.PHASES[name][0])
    for phase, occurrence, _ in cases:
        asked: list[float] = []

        def happens(phase: str = phase, asked: list[float] = asked) -> None:
            asked.append(time.monotonic())
            os.kill(os.getpid(), random.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT]))
            time.sleep(60 if "for ever" in phase else FINISH_S + 0.5 if "long" in phase else 0.1)

        run_dir = Path(root) / "runs" / phase.replace(" ", "_")
        cfg = compose_config(
            tiny.overrides(run_dir, data=2, **KEYS, **{"model.teacher.cache_dir": Path(root) / f"cache_{phase}"})
        )
        where = 0 if phase.partition(" that")[0] in RANK_0 else guilty
        with faults.planted(phase.partition(" that")[0], happens, rank=where, occurrence=occurrence):
            outcome = train(cfg, replay_engines(131))
        assert outcome is not None
        saved = sorted(p.name for p in (run_dir / "checkpoints").glob("*")) if run_dir.is_dir() else []
        seconds = time.monotonic() - asked[0] if asked else 0.0
        print(phase, outcome.step, saved, f"{seconds:.1f} s", flush=True)
        gc.collect()  # a run's process groups hang in reference cycles, each with hundreds of threads
        again = train(cfg, replay_engines(131))
        gc.collect()
        found.append((phase, outcome.stopped_by_signal, outcome.step, saved, seconds, again is not None and again.step))
    return found


def figures(run_dir: Path) -> list[tuple[float, ...]]:
    by_step = {line["step"]: line for line in train_lines(run_dir)}
    return [tuple(by_step[s][k] for k in EXACT) for s in sorted(by_step)]


@pytest.mark.random
@pytest.mark.timeout(400)
def test_a_stop_in_any_phase_loses_nothing(tmp_path: Path) -> None:
    tiny = TinyRun.make(tmp_path)
    guilty, cases = random.choice([0, 1]), random.sample(CASES, PER_RUN)
    by_rank = run_distributed(stop_in_each, 2, str(tiny.root), [*cases, (STRAIGHT, 99, 0)], guilty, timeout_s=350)
    straight = tmp_path / "runs" / STRAIGHT.replace(" ", "_")
    wanted = load_file(straight / "hf" / "model.safetensors")
    for (phase, _, step), mine, theirs in zip(cases, *by_rank, strict=False):
        run_dir = tmp_path / "runs" / phase.replace(" ", "_")
        stopped = phase not in ("export", "report")  # which end by themselves, and with them the run
        assert mine[1:4] == theirs[1:4] == (stopped, step, [f"step_{step:08d}"] if step else []), phase
        assert max(mine[4], theirs[4]) < 10, phase
        assert (run_dir / "report.html").is_file(), phase
        assert figures(run_dir) == figures(straight), phase
        ours = load_file(run_dir / "hf" / "model.safetensors")
        assert all(torch.equal(ours[k], wanted[k]) for k in wanted), phase
        steps = [path.name for path in sorted((run_dir / "validation").iterdir())]
        assert steps == ["step_00000000.json", "step_00000001.json", "step_00000002.json"], phase


class OnEachRank(ReplayEngine):
    """In the trainer's process: sleeps between rollouts, and takes a step every 10 ms. The ``call``-th rollouts take
    for ever: ``happens`` as they begin."""

    def __init__(self, events: list[str], call: int, happens: Callable[[], object]) -> None:
        super().__init__(131)
        self.events, self.left, self.happens, self.holds = events, call, happens, False

    def check_room(self) -> None:
        """It needs none."""

    def generate(
        self, requests: Sequence[RolloutRequest], finished: Finished | None = None, *, wanted: Wanted | None = None
    ) -> list[Rollout]:
        assert self.holds, "rollouts without weights"
        self.left -= 1
        if not self.left:
            self.happens()
            for step in range(1, 3000):
                time.sleep(0.01)
                if wanted is not None and not wanted():
                    self.events.append(f"given up after step {step}")
                    raise Abandoned(f"nobody waits for {len(requests)} rollouts")
        return super().generate(requests)

    def update_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> RefreshStats:
        self.holds = True
        return super().update_weights(stream, version)

    def sleep(self) -> bool:
        self.holds = False
        self.events.append("sleep")
        return True


class Engines(GivenEngines):
    """The student's on every rank, the teacher's a plain double."""

    def teacher(self, cfg: Any) -> ReplayEngine:
        return ReplayEngine(131)


def stop_on_every_rank(
    rank: int, world_size: int, root: str, tensor: int, call: int, guilty: int
) -> tuple[bool, int, list[str], float, list[str]]:
    """A run that nothing stops, then one that is stopped in the ``call``-th rollouts and resumed. Whether it was
    stopped, the steps done, its checkpoints, the seconds that it took to stop, and what its engine saw from the signal
    on."""
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    from nemo_tropd.parallel import signals
    from nemo_tropd.rollout import placement
    from nemo_tropd.training.run import train
    from tests.e2e.compose import compose_config

    signals.FINISH_S = 0.5
    placement.placement_of = lambda cfg, **_: "colocated"
    tiny, events, asked = TinyRun.at(Path(root)), list[str](), list[float]()

    def happens() -> None:
        events.clear()
        asked.append(time.monotonic())
        if rank == guilty:
            os.kill(os.getpid(), random.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT]))

    def run(name: str, call: int) -> Any:
        layout = {"tensor": tensor, "data": world_size // tensor}
        cfg = compose_config(tiny.overrides(Path(root) / "runs" / name, **layout, **KEYS))
        outcome = train(cfg, Engines(lambda: OnEachRank(events, call, happens)))
        gc.collect()
        return outcome

    run(STRAIGHT, 0)
    with faults.planted("save", lambda: events.append("save"), rank=rank):
        outcome = run("stopped", call)
    seconds = time.monotonic() - asked[0]
    saved = sorted(p.name for p in (Path(root) / "runs" / "stopped" / "checkpoints").glob("*"))
    seen = list(events)
    run("stopped", 0)
    return outcome.stopped_by_signal, outcome.step, saved, seconds, seen


@pytest.mark.random
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (2, 1), (2, 2)])
def test_engines_on_every_rank_give_up_rollouts_that_take_too_long(ranks: int, tensor: int, tmp_path: Path) -> None:
    """Those of a tensor group behind the same step, though the signal reaches one rank alone."""
    tiny, guilty = TinyRun.make(tmp_path), random.randrange(ranks)
    call = random.choice([3, 4])  # of the validation after step 1, and of step 2
    found = run_distributed(stop_on_every_rank, ranks, str(tiny.root), tensor, call, guilty, timeout_s=350)
    for stopped, step, saved, seconds, seen in found:
        assert (stopped, step, saved) == (True, 1, ["step_00000001"])
        assert 0.5 < seconds < 20, seconds
        assert seen[0].startswith("given up") and seen[1:] == ["sleep", "save"], "the engine sleeps while it is saved"
    if tensor > 1:
        assert len({seen[0] for *_, seen in found}) == 1, "each step is a collective of the engines"
    straight, run_dir = tmp_path / "runs" / STRAIGHT, tmp_path / "runs" / "stopped"
    assert figures(run_dir) == figures(straight) and len(figures(straight)) == STEPS
    ours, wanted = (load_file(path / "hf" / "model.safetensors") for path in (run_dir, straight))
    assert all(torch.equal(ours[k], wanted[k]) for k in wanted)
    steps = [path.name for path in sorted((run_dir / "validation").iterdir())]
    assert steps == ["step_00000000.json", "step_00000001.json", "step_00000002.json"]


def votes(rank: int, world_size: int, own_groups: bool) -> list[bool]:
    """Of the tensor group, when one rank after the other has something to say."""
    from nemo_tropd.parallel import topology as module

    if own_groups:  # as beside NCCL
        module._on_gloo = lambda: False
    topology = module.Topology.start(tensor_parallel=2)
    found = [topology.any_tensor_rank(rank == guilty) for guilty in range(world_size)]
    group = topology.tensor_control_group
    assert group is not None and (group in topology.own_groups) == own_groups
    topology.stop()
    return found


@pytest.mark.parametrize("own_groups", [False, True])
def test_the_ranks_of_a_tensor_group_vote_among_themselves(own_groups: bool) -> None:
    first, second = [True, True, False, False], [False, False, True, True]
    assert run_distributed(votes, 4, own_groups) == [first, first, second, second]
