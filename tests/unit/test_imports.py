"""Collections are off while libraries are imported, and as they were afterwards."""

from __future__ import annotations

import gc

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
    with without_collections():
        kept = [[] for _ in range(10)]
    assert gc.get_freeze_count() >= len(kept)
    assert not any(a is b for a in gc.get_objects() for b in kept)
