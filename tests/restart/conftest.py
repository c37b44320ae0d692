from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from .bed import Bed


@pytest.fixture
def bed() -> Iterator[Callable[..., Bed]]:
    """Makes a Bed with words for `pvdrivers serve`; ended with the test. The run directory is on tmpfs."""
    with ExitStack() as stack:
        top = Path(stack.enter_context(TemporaryDirectory(dir="/dev/shm", prefix="pv-restart-")))

        def make(*words: str) -> Bed:
            return stack.enter_context(Bed(top / "run", *words))

        yield make
