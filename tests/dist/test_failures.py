"""An error of any kind on one rank, in any phase, ends all ranks within seconds, and says once whose it was."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from nemo_tropd.convert.families import ConversionError
from tests import faults
from tests.dist.run_distributed import DistributedFailure, run_distributed
from tests.doubles import replay_engines
from tests.e2e.tiny_run import ROOT, TinyRun

pytestmark = pytest.mark.random
LIMIT_S = 10.0
PER_RUN = 6  # of the phases, other ones in every run
KEYS = {"trainer.tropd.max_steps": 2, "trainer.tropd.val_check_interval": 1, "trainer.distributed_timeout_s": 600}
ANY_RANK = ("plan", "load", "pack", "teacher", "student", "optimizer", "validation", "save", "export")
RANK_0 = ("responses", "engine start", "rollout", "refresh", "log", "report")


class Strange(BaseException):
    """As torch's CheckpointException, it derives from BaseException."""


def fail_at(rank: int, world_size: int, root: str, phase: str, guilty: int, kind: type[BaseException]) -> None:
    """Train; on rank ``guilty`` the phase raises. Notes when, and what this rank prints."""
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    from nemo_tropd.command_line import compose_command_line
    from nemo_tropd.training import run

    def happens() -> None:
        Path(root, "failed_at").write_text(str(time.time()))
        raise kind("planted fault")

    faults.plant(phase, happens, rank=guilty, occurrence=random.choice([1, 2]) if phase == "student" else 1)
    output = os.open(Path(root, f"stderr_{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 2)
    overrides = TinyRun.at(Path(root)).overrides(Path(root) / f"run_{phase}", data=2, **KEYS)
    run.main(compose_command_line(overrides, ROOT / "conf"), replay_engines(131))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyRun.make(tmp_path_factory.mktemp("failures")).root


@pytest.mark.timeout(400)
def test_one_ranks_error_is_everybodys_at_once(root: Path) -> None:
    for phase in random.sample([*ANY_RANK, *RANK_0], PER_RUN):
        guilty = random.choice([0, 1]) if phase in ANY_RANK else 0
        kind = random.choice([OSError, KeyError, ConversionError, Strange])
        with pytest.raises(DistributedFailure) as failure:
            run_distributed(fail_at, 2, str(root), phase, guilty, kind, timeout_s=100, init_gloo=False)
        seconds = time.time() - float((root / "failed_at").read_text())
        everything = "\n".join((root / f"stderr_{rank}").read_text() for rank in range(2))
        print(f"{phase} on rank {guilty}: {kind.__name__}, {seconds:.1f} s")
        assert seconds < LIMIT_S
        assert "exit code" in str(failure.value) and "still running" not in str(failure.value)
        lines = [line for line in everything.splitlines() if line.startswith(f"rank {guilty} on ")]
        assert len(lines) == 1 and "planted fault" in lines[0] and kind.__name__ in lines[0], everything
        assert "PeerLost" not in everything, everything
