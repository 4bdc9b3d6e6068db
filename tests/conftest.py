"""Fresh random inputs in every run, reproducible: each test's generators start from one printed seed and its name."""

from __future__ import annotations

import os

import pytest

from tests.random_inputs import start_generators


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


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "random: the inputs differ in every run; see --draws and --seed")
    if config.option.seed is None:
        config.option.seed = int.from_bytes(os.urandom(4), "little")
    start_generators(f"{config.option.seed} ")


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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    start_generators(f"{item.config.option.seed} {item.nodeid}")
