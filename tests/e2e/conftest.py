"""One real engine for every run of a session: starting it costs more than all the runs together."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.config import TropdConfig
from nemo_tropd.quiet import quiet_libraries
from nemo_tropd.report import drawing
from nemo_tropd.rollout.engine import Finished, RefreshStats, RolloutEngine, RolloutRequest
from nemo_tropd.rollout.placement import Engines
from tests.e2e.tiny_run import TinyRun
from tests.empty_charts import empty

TINY_VOCABULARY = 131  # of tests.tiny_models


class SharedEngine:
    """An engine that outlives the runs it serves; ``before_generate`` lets a test interfere."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.before_generate: Callable[[Sequence[RolloutRequest]], None] | None = None
        self.running = False

    def start(self) -> None:
        """Once."""
        if not self.running:
            self.engine.start()
        self.running = True

    def sleep(self) -> bool:
        """The engine's own."""
        return self.engine.sleep()

    def close(self, *, run_over: bool = False) -> None:
        """It goes on."""

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        """The engine's own."""
        if self.before_generate is not None:
            self.before_generate(requests)
        return self.engine.generate(requests, finished)

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """The engine's own."""
        return self.engine.update_weights(stream, version)


class SharedEngines(Engines):
    """The shared engine for students; one engine for the tiny run's teacher, too, and an own one for any other."""

    def __init__(self, shared: SharedEngine, teachers: dict[str, SharedEngine]) -> None:
        super().__init__(TINY_VOCABULARY)
        self.shared, self.teachers = shared, teachers

    def student(self, cfg: TropdConfig) -> RolloutEngine:
        """The shared engine."""
        return self.shared

    def teacher(self, cfg: TropdConfig) -> RolloutEngine:
        """Shared if the path ends as the tiny run's."""
        path = cfg.model.teacher.path
        if not path.endswith("/teacher"):
            return super().teacher(cfg)
        if path not in self.teachers:
            self.teachers[path] = SharedEngine(super().teacher(cfg))
        return self.teachers[path]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """A run's process groups hang in reference cycles, each with sockets and threads of its own."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real ones in the tests of the complete path alone."""
    if request.path.name != "test_training.py":
        monkeypatch.setattr(drawing, "_svg", empty)


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
    shared = SharedEngine(Engines(TINY_VOCABULARY).student(cfg))
    shared.start()
    yield shared
    shared.engine.close()


@pytest.fixture(scope="session")
def teachers() -> Iterator[dict[str, SharedEngine]]:
    """Engines of teachers by path, as far as a test needed them."""
    started: dict[str, SharedEngine] = {}
    yield started
    for teacher in started.values():
        teacher.engine.close()


@pytest.fixture
def engines(shared_engine: SharedEngine, teachers: dict[str, SharedEngine]) -> Iterator[SharedEngines]:
    """An engine factory: see SharedEngines."""
    yield SharedEngines(shared_engine, teachers)
    shared_engine.before_generate = None
