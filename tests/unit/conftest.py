"""What several unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nemo_tropd.parallel.topology import Topology


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    made = Topology.start()
    yield made
    made.stop()
