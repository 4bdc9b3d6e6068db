"""The GPU's megatron-core is Python: what of it needs no GPU runs here, in the place of the CPU's older one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.wheels import NoIndex, pinned, python_files

TESTS = (
    # Since 0.19 there is no common.pt, and its writer, planner and validation are others.
    "tests/dist/test_optimizer_shards.py::test_each_rank_saves_and_loads_its_own_states_in_megatrons_files[1]",
    "tests/unit/test_optimizer.py::test_states_are_loaded_at_another_rate_and_decay",
    "tests/unit/test_checkpoint.py::test_a_checkpoint_leaves_no_page_locked_memory_behind",
    "tests/unit/test_gpu_config.py",
)
PASSED = "5 passed"
RUN = "import sys, pytest, megatron.core as m; assert m.__version__ == sys.argv[1]; sys.exit(pytest.main(sys.argv[2:]))"


@pytest.mark.timeout(600)
def test_checkpoints_and_configs_are_those_of_the_pinned_megatron() -> None:
    try:
        folder = python_files("megatron-core")
    except NoIndex as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-c", RUN, pinned("megatron-core"), "-q", "-p", "no:cacheprovider", *TESTS],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0 and PASSED in done.stdout, (done.stdout + done.stderr)[-4000:]
