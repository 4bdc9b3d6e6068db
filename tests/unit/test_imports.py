"""Collections are off while libraries are imported, and as they were afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from nemo_tropd.imports import without_collections


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_collections_are_as_before(enabled: bool, fails: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        if fails:
            with pytest.raises(ImportError), without_collections():
                raise ImportError
        else:
            with without_collections():
                assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_what_there_is_then_is_looked_at_no_more() -> None:
    """With ``freeze`` alone: of a process that has begun long ago, garbage would stay for ever."""
    gc.collect()  # what other tests have left is not to stay
    frozen = gc.get_freeze_count()
    with without_collections():
        kept = [[i] for i in range(10)]
    assert gc.get_freeze_count() == frozen and held(kept) == len(kept)
    with without_collections(freeze=True):
        pass
    assert gc.get_freeze_count() >= frozen + len(kept) and held(kept) == 0


def held(objects: list[list[int]]) -> int:
    """How many a collection would look at."""
    looked_at = {id(o) for o in gc.get_objects()}
    return sum(id(o) in looked_at for o in objects)


def test_nothing_is_frozen_at_the_end() -> None:
    """Extensions would take what is still there for leaks, and say so to the user, after a run's last words."""
    words = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count()))\n"
    words += "from nemo_tropd.imports import without_collections\nwith without_collections(freeze=True): pass\n"
    words += "print(gc.get_freeze_count() > 0)\n"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", "0"] and not done.stderr
