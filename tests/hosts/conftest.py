"""The reference: the same run in four processes of this host that no launcher has started, made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.dist.run_distributed import run_distributed
from tests.e2e.tiny_run import ROOT, TinyRun
from tests.hosts.launching import VOCABULARY, figures, launch_overrides


@dataclass(frozen=True)
class Reference:
    """Tiny models, and the figures of TP 2 x DP 2 on one host."""

    tiny: TinyRun
    root: Path
    expected: list[tuple[float, ...]]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Made without docker/launch.sh and torchrun, which may then change nothing."""
    root = tmp_path_factory.mktemp("hosts")
    tiny = TinyRun.make(root)
    run_distributed(_train, 4, launch_overrides(tiny, root / "one"), timeout_s=200)
    return Reference(tiny, root, figures(root / "one"))


def _train(rank: int, world_size: int, overrides: list[str]) -> None:
    from nemo_tropd.command_line import compose_command_line
    from nemo_tropd.config_checks import resolve
    from nemo_tropd.training.run import train
    from tests.doubles import GivenEngines, ReplayEngine

    train(resolve(compose_command_line(overrides, ROOT / "conf")), GivenEngines(lambda: ReplayEngine(VOCABULARY)))
