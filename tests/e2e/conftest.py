"""One real engine for every run of a session: starting it costs more than all the runs together."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.config import TropdConfig
from nemo_tropd.quiet import quiet_libraries
from nemo_tropd.rollout.engine import RefreshStats, RolloutEngine, RolloutRequest
from nemo_tropd.rollout.placement import Engines
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

    def close(self, *, run_over: bool = False) -> None:
        """It goes on."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """The engine's own."""
        if self.before_generate is not None:
            self.before_generate(requests)
        return self.engine.generate(requests)

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """The engine's own."""
        return self.engine.update_weights(stream, version)


class SharedEngines(Engines):
    """The shared engine for students; a teacher gets an engine of its own."""

    def __init__(self, shared: SharedEngine) -> None:
        super().__init__(TINY_VOCABULARY)
        self.shared = shared

    def student(self, cfg: TropdConfig) -> RolloutEngine:
        """The shared engine."""
        return self.shared


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
    from tests.e2e.compose import compose_config

    quiet_libraries()
    cfg = compose_config(tiny.overrides(tiny.root / "engine"))
    engine = Engines(TINY_VOCABULARY).student(cfg)
    engine.start()
    yield SharedEngine(engine)
    engine.close()


@pytest.fixture
def engines(shared_engine: SharedEngine) -> Iterator[SharedEngines]:
    """An engine factory: the shared engine for students, a new one for a teacher that has to generate."""
    yield SharedEngines(shared_engine)
    shared_engine.before_generate = None
