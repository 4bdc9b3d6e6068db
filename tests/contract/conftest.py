"""The pinned packages' sources, for every test of this folder."""

from __future__ import annotations

import pytest

from tests.contract.sources import Library
from tests.contract.wheels import PACKAGES, NoIndex, python_files


@pytest.fixture(scope="session")
def library() -> Library:
    """The tests are skipped where no index gives the packages."""
    try:
        return Library(*(python_files(package) for package in PACKAGES))
    except NoIndex as reason:
        pytest.skip(str(reason))
