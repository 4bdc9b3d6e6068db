"""One real engine for every run of a session: starting it costs more than all the runs together."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.config import TropdConfig
from nemo_tropd.quiet import quiet_libraries
from nemo_tropd.rollout.engine import RefreshStats, RolloutEngine, RolloutRequest
from tests.e2e.tiny_run import TinyRun

TINY_VOCABULARY = 131  # of tests.tiny_models


class SharedEngine:
    """A running engine that outlives the runs it serves; ``before_generate`` lets a test interfere."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.before_generate: Callable[[Sequence[RolloutRequest]], None] | None = None

    def start(self) -> None:
        """It runs already."""

    def sleep(self) -> bool:
        """The engine's own."""
        return self.engine.sleep()

    def close(self) -> None:
        """It goes on."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """The engine's own."""
        if self.before_generate is not None:
            self.before_generate(requests)
        return self.engine.generate(requests)

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """The engine's own."""
        return self.engine.update_weights(stream, version)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """A run's process groups hang in reference cycles, each with sockets and threads of its own."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Models and prompts, and the teacher's responses once they are written."""
    return TinyRun.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shared_engine(tiny: TinyRun) -> Iterator[SharedEngine]:
    """A vLLM engine on the tiny student."""
    from nemo_tropd.training.engines import engine_maker
    from tests.e2e.compose import compose_config

    quiet_libraries()
    cfg = compose_config(tiny.overrides(tiny.root / "engine"))
    engine = engine_maker(TINY_VOCABULARY)(cfg, tiny.student, True)()
    engine.start()
    yield SharedEngine(engine)
    engine.close()


@pytest.fixture
def engines(shared_engine: SharedEngine) -> Iterator[Callable[[TropdConfig, Path, bool], Callable[[], RolloutEngine]]]:
    """An engine maker: the shared engine for students, a new one for a teacher that has to write."""
    from nemo_tropd.training.engines import engine_maker

    def make(cfg: TropdConfig, path: Path, refreshable: bool) -> Callable[[], RolloutEngine]:
        return (lambda: shared_engine) if refreshable else engine_maker(TINY_VOCABULARY)(cfg, path, False)

    yield make
    shared_engine.before_generate = None
