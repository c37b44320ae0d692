"""A bed for each test, which fails for any fault of our own unless it asks for one with `own_fault`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.device.bed import Bed, new_bed, no_own_faults
from tests.device.yard import Yard


@pytest.fixture
def bed() -> Iterator[Bed]:
    with new_bed() as found:
        yield found


@pytest.fixture
def own_fault() -> None:
    """This test orders a fault of our own, and looks at what comes of it."""


@pytest.fixture(autouse=True)
def own_faults(request: pytest.FixtureRequest) -> Iterator[None]:
    if "own_fault" in request.fixturenames:
        yield
        return
    with no_own_faults():
        yield


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    """A store with guests and daemons, which are ended afterwards."""
    with ExitStack() as stack:
        yield Yard(tmp_path, stack)
