"""Fresh random inputs in every run, reproducible: each test's generators start from one printed seed and its name.

Also which tests stay together when several processes share them (pytest-xdist, as ``make test`` uses it).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # beside other tests: a second thread would mostly spin, at twice the time
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

from nemo_tropd.imports import without_collections
from tests.default_signals import default_signals
from tests.random_inputs import start_generators

# What these folders start is shared by all their files.
TOGETHER = ("hosts", "e2e")
# First those that take longest: hosts, which wait much, and e2e, each in one process to the end, beside dist.
FIRST = ("hosts", "e2e", "dist", "benchmarks")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("random inputs")
    group.addoption(
        "--draws", type=int, default=1, metavar="N",
        help="run every test marked 'random' N times, each time with other random inputs; -m random runs those alone",
    )  # fmt: skip
    group.addoption(
        "--seed", type=int, default=None, metavar="S",
        help="draw the random inputs of the run that printed 'random inputs: --seed S' (a test's inputs depend on S "
        "and its own name alone, so one failed test can be run by itself)",
    )  # fmt: skip
    parser.addoption(
        "--images", action="append", choices=("cpu", "gpu"), default=[],
        help="build this image and use it (tests/docker/build.py); may be repeated",
    )  # fmt: skip
    parser.addoption(
        "--image-storage", metavar="DIR", help="with --images: keep layers and images there, for the next time",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "random: the inputs differ in every run; see --draws and --seed")
    if config.option.seed is None:
        config.option.seed = int.from_bytes(os.urandom(4), "little")
    start_generators(f"{config.option.seed} ")
    default_signals()


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed {config.option.seed}"


def pytest_pycollect_makemodule(module_path: object, parent: pytest.Collector) -> None:
    """Numbers drawn while a module is imported."""
    start_generators(f"{parent.config.option.seed} {str(module_path).rpartition('tests')[2]}")


@pytest.fixture(autouse=True)
def repetition(request: pytest.FixtureRequest) -> int:
    """Which of ``--draws`` repetitions this is."""
    return getattr(request, "param", 0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    draws = metafunc.config.option.draws
    if draws > 1 and metafunc.definition.get_closest_marker("random"):
        metafunc.parametrize("repetition", range(draws), indirect=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests, or a folder's of ``TOGETHER``, run in one process."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return _folder(file) if _folder(file) in TOGETHER else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long ones first, so that no process is left with them at the end."""
    if hasattr(config, "workerinput"):  # of xdist
        items.sort(key=lambda item: _place(_folder(item.nodeid)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What all test files import stays: a collection that looks at it takes a second, and e2e asks for many."""
    with without_collections(freeze=True):
        return (yield)


def _place(folder: str) -> int:
    return FIRST.index(folder) if folder in FIRST else len(FIRST)


def _folder(nodeid: str) -> str:
    """tests/dist/test_loop.py::test_order -> dist."""
    return nodeid.partition("::")[0].split("/")[-2]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    start_generators(f"{item.config.option.seed} {item.nodeid}")
