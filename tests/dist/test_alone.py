"""An error that leaves the other ranks in a collective is its own rank's alone: it ends all of them within seconds, and
is printed. What the run survives is waited for; what others do not hear is not lost."""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.parallel import agreement, roll_call
from nemo_tropd.parallel.agreement import RankError, on_every_rank, on_rank_zero
from nemo_tropd.parallel.roll_call import PeerLost, RollCall, collective_timeout_s
from nemo_tropd.parallel.signals import Stopped
from nemo_tropd.rollout.collective import EveryRankRollouts, RankZeroRollouts
from nemo_tropd.rollout.engine import EngineDied, RefreshStats, RolloutRequest
from nemo_tropd.training import checkpoint
from nemo_tropd.training.checkpoint import Checkpoints, DamagedCheckpoint
from nemo_tropd.training.resume import RunState
from tests.dist.run_distributed import DistributedFailure, run_distributed
from tests.doubles import ReplayEngine
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.random
TIMEOUT_S, LIMIT_S = 600.0, 25.0
REQUESTS = [RolloutRequest([1, 2], [], i, i, i, 4) for i in range(3)]


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory: planted")


class SplitEngine(ReplayEngine):
    """Each of its calls has a collective of the tensor-parallel group, as vLLM's have; ``fails`` is called before it
    with the call's name."""

    def __init__(self, group: Any, fails: Callable[[str], None]) -> None:
        super().__init__(100)
        self._group, self._fails = group, fails

    def _together(self, name: str) -> None:
        self._fails(name)
        dist.all_reduce(torch.zeros(1), group=self._group)

    def start(self) -> None:
        """As every call."""
        self._together("start")

    def generate(self, requests: Sequence[RolloutRequest], *args: Any, **more: Any) -> list[Rollout]:
        """As every call."""
        self._together("generate")
        return super().generate(requests)

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """Memory is woken before the stream is read."""
        self._fails("wake")
        return super().update_weights(stream, version)


def fail(rank: int, world_size: int, root: str, place: str, guilty: int) -> None:
    """On rank ``guilty`` memory is short in ``place``. What this rank raises is kept, and what it prints."""
    from nemo_tropd.parallel.topology import Topology

    roll_call.FOLLOW_S = 1.0
    output = os.open(Path(root, f"stderr_{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 2)

    def happens(here: str) -> None:
        if here == place and rank == guilty:
            Path(root, "failed_at").write_text(str(time.time()))
            out_of_memory()

    def weights(topology: Topology) -> Iterator[tuple[str, Tensor]]:
        for i in range(3):
            if i == 1:
                happens("stream")
                happens("leader's stream")
            dist.all_reduce(torch.ones(1), group=topology.tensor_group)
            yield f"w{i}", torch.ones(1)

    try:
        with RollCall(TIMEOUT_S) as call:
            call.together(lambda: None)
            topology = Topology.start(2, timeout_s=collective_timeout_s(TIMEOUT_S))
            kind = RankZeroRollouts if place == "leader's stream" else EveryRankRollouts
            engine = ReplayEngine if kind is RankZeroRollouts else partial(SplitEngine, topology.tensor_group, happens)
            make: Callable[[], Any] = partial(engine, 100) if engine is ReplayEngine else engine
            kind(topology, make, partial(weights, topology), 100).generate(REQUESTS, 0)
    except BaseException as error:
        Path(root, f"raised_{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("place", ["start", "generate", "wake", "stream", "leader's stream"])
def test_an_error_beside_a_collective_ends_all_ranks_and_is_printed_once(tmp_path: Path, place: str) -> None:
    guilty = random.choice([0, 1])
    with pytest.raises(DistributedFailure) as failure:
        run_distributed(fail, 2, str(tmp_path), place, guilty, timeout_s=100, init_gloo=False)
    assert "exit code 1" in str(failure.value) and "still running" not in str(failure.value)
    assert time.time() - float((tmp_path / "failed_at").read_text()) < LIMIT_S
    assert_named_once(tmp_path, guilty, "EngineError: OutOfMemoryError: CUDA out of memory: planted")
    other = tmp_path / f"raised_{1 - guilty}"
    if place == "wake":  # before the first item nothing is lost: all ranks read on, and raise it together
        assert other.read_text() == (tmp_path / f"raised_{guilty}").read_text()
    elif other.exists():  # else it was ended out of its collective
        assert other.read_text().startswith(f"PeerFailed: rank {guilty} on ")


def assert_named_once(root: Path, guilty: int, text: str) -> None:
    said = "\n".join((root / f"stderr_{rank}").read_text() for rank in range(2))
    lines = [line for line in said.splitlines() if "planted" in line]
    assert len(lines) == 1 and lines[0].startswith(f"rank {guilty} on ") and text in lines[0], said
    assert "PeerLost" not in said and text in (root / f"raised_{guilty}").read_text()


def restore(rank: int, world_size: int, root: str, what: str, guilty: int) -> None:
    """On rank ``guilty`` reading a checkpoint fails, while the other one is in Megatron's collectives."""
    from nemo_tropd.parallel.topology import Topology
    from tests.unit.test_optimizer import Student

    roll_call.FOLLOW_S, checkpoint._DAMAGE_S = 1.0, 4.0
    output = os.open(Path(root, f"stderr_{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        with RollCall(TIMEOUT_S) as call:
            call.together(lambda: None)
            topology = Topology.start(timeout_s=collective_timeout_s(TIMEOUT_S))
            checkpoints = Checkpoints(Path(root) / "run", topology, hf_source=Path(root) / "hf", keep=2)
            student = Student(Path(root) / "hf", topology)
            for step in (1, 2):
                path = checkpoints.save(student.ddp.module, student.optimizer, RunState(step, {}, {}, "r"))
            os.dup2(output, 2)
            plain = checkpoint.dist_checkpointing.load

            def load(*args: Any, **more: Any) -> Any:
                if rank == guilty:
                    Path(root, "failed_at").write_text(str(time.time()))
                    raise KeyError("planted") if what == "damage" else MemoryError("planted")
                return plain(*args, **more)

            checkpoint.dist_checkpointing.load = load
            checkpoints.restore(path, student.ddp.module, student.optimizer)
    except BaseException as error:
        Path(root, f"raised_{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("what", ["memory", "damage"])
def test_an_error_of_one_rank_that_reads_a_checkpoint_ends_all(tmp_path: Path, what: str) -> None:
    """The older one, which all could try, is not tried by one alone."""
    make_tiny(tmp_path / "hf", "qwen2", layers=1)
    guilty = random.choice([0, 1])
    with pytest.raises(DistributedFailure) as failure:
        run_distributed(restore, 2, str(tmp_path), what, guilty, timeout_s=100, init_gloo=False)
    assert "exit code 1" in str(failure.value) and "still running" not in str(failure.value)
    assert time.time() - float((tmp_path / "failed_at").read_text()) < LIMIT_S
    text = "CheckpointError: DamagedCheckpoint: " if what == "damage" else "CheckpointError: "
    assert_named_once(tmp_path, guilty, text + f"{tmp_path}/run/checkpoints/step_00000002 cannot be loaded")


def restored(rank: int, world_size: int, root: str, what: str) -> tuple[str, int]:
    """Rank 1 finds the newest checkpoint damaged, at once or when it fills its model; the other one takes its time."""
    from nemo_tropd.parallel.topology import Topology
    from tests.unit.test_optimizer import Student

    agreement.ALONE_AFTER_S = checkpoint.ALONE_AFTER_S = 0.1
    topology = Topology.start()
    checkpoints = Checkpoints(Path(root) / "run", topology, hf_source=Path(root) / "hf", keep=2)
    student = Student(Path(root) / "hf", topology)
    for step in (1, 2):
        path = checkpoints.save(student.ddp.module, student.optimizer, RunState(step, {}, {}, "r"))
    plain, calls = (checkpoint.dist_checkpointing.load if what == "read" else checkpoint._fill), [0]

    def damaged(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            time.sleep(2.0 * (rank == 0))
            if rank == 1 or what == "read":
                raise KeyError("planted")
        return plain(*args)

    if what == "read":
        checkpoint.dist_checkpointing.load = damaged
    else:
        checkpoint._fill = damaged
    found, state = checkpoints.restore(path, student.ddp.module, student.optimizer)
    return found.name, state.step


@pytest.mark.timeout(200)
@pytest.mark.parametrize("what", ["read", "fill"])
def test_a_damaged_checkpoint_is_waited_for_and_the_one_before_it_used(tmp_path: Path, what: str) -> None:
    make_tiny(tmp_path / "hf", "qwen2", layers=1)
    assert (
        run_distributed(restored, 2, str(tmp_path), what, timeout_s=100, init_gloo=False) == [("step_00000001", 1)] * 2
    )


def slow_others(rank: int, world_size: int) -> dict[str, str]:
    """What every rank gets if rank 1 raises at once, and the others need some time."""
    from nemo_tropd.parallel.topology import Topology

    agreement.ALONE_AFTER_S = 0.1
    topology, found = Topology.start(2), {}

    class Slow(ReplayEngine):
        def __init__(self, error: BaseException) -> None:
            super().__init__(100)
            self.error = error

        def generate(self, requests: Sequence[RolloutRequest], *args: Any, **more: Any) -> list[Rollout]:
            """Of rank 1 an error, of rank 0 rollouts later."""
            if rank == 1:
                raise self.error
            time.sleep(1.5)
            return super().generate(requests)

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield "w", torch.ones(1)

    def outcome(work: Callable[[], Any]) -> str:
        try:
            return f"result: {work()}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def later(error: BaseException) -> None:
        if rank == 1:
            raise error
        time.sleep(1.5)

    stopped = EveryRankRollouts(topology, lambda: Slow(Stopped("asked to stop")), stream, 100)
    found["stopped"] = outcome(lambda: stopped.generate(REQUESTS, 0))
    found["no collectives"] = outcome(lambda: on_every_rank(topology, lambda: later(KeyError("planted"))))
    brief = partial(on_every_rank, topology, patience=lambda error: 60.0)
    found["in time"] = outcome(lambda: brief(lambda: later(KeyError("planted"))))
    topology.barrier()  # every rank is at the same collective
    return found


@pytest.mark.timeout(200)
def test_ranks_that_are_only_slow_are_waited_for() -> None:
    for found in run_distributed(slow_others, 2, timeout_s=100, init_gloo=False):
        assert found == {
            "stopped": "Stopped: asked to stop",
            "no collectives": "RankError: KeyError: 'planted'",
            "in time": "RankError: KeyError: 'planted'",
        }


def dying(stream: Iterator[tuple[str, Tensor]]) -> None:
    raise EngineDied("planted")


def slow_stream(rank: int, world_size: int) -> str:
    """What every rank gets if rank 0's engine dies at once, and the others' streams end later."""
    from nemo_tropd.parallel.topology import Topology

    agreement.ALONE_AFTER_S = 0.1
    topology = Topology.start()

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield "w", torch.ones(1)
        time.sleep(1.5 * rank)

    try:
        agreement.on_stream(topology, stream(), dying)
    except Exception as error:
        topology.barrier()
        return f"{type(error).__name__}: {error}"
    return "nothing was noticed"


@pytest.mark.timeout(200)
def test_an_engine_that_dies_over_a_stream_can_be_replaced() -> None:
    assert run_distributed(slow_stream, 2, timeout_s=100, init_gloo=False) == ["EngineDied: planted"] * 2


def unheard(rank: int, world_size: int, where: str) -> tuple[str, str]:
    """Rank 0's error comes when rank 1 is gone: what rank 0 raises, and what it prints."""
    from nemo_tropd.parallel.topology import Topology

    printed = io.StringIO()
    error = Stopped("planted") if where == "stop" else EngineDied("planted")
    try:
        with redirect_stderr(printed), RollCall(20.0) as call:
            call.together(lambda: None)
            topology = Topology.start(timeout_s=collective_timeout_s(20.0))
            topology.barrier()
            if rank == 1:
                call.stop()
                dist.destroy_process_group()
                return "", ""

            def work() -> None:
                time.sleep(2.0)
                raise error

            if where == "rank 0":
                on_rank_zero(topology, work, heartbeat_s=60.0)
            else:
                on_every_rank(topology, work)
    except (PeerLost, RankError, EngineDied, Stopped) as raised:
        return type(raised).__name__, printed.getvalue()
    return "nothing was noticed", ""


@pytest.mark.timeout(200)
@pytest.mark.parametrize("where", ["every rank", "rank 0", "stop"])
def test_an_error_that_no_other_rank_hears_is_printed_beside_which_ranks_are_lost(where: str) -> None:
    (raised, printed), _ = run_distributed(unheard, 2, where, timeout_s=100, init_gloo=False)
    assert raised == "PeerLost" and "rank 1 on " in printed and "did not respond" in printed, (raised, printed)
    assert ("RankError: EngineDied: planted" in printed) == (where != "stop"), printed


def test_damage_is_no_reason_to_try_another_checkpoint_alone() -> None:
    error = DamagedCheckpoint("step_3 cannot be loaded")
    alone = agreement._unheard(error, checkpoint.CheckpointError)
    assert type(alone) is checkpoint.CheckpointError and alone is not error
    assert str(agreement._unheard(alone, checkpoint.CheckpointError)) == str(alone)
