from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.restart.bed import Bed


@pytest.fixture
def bed() -> Iterator[Callable[..., Bed]]:
    """Makes a Bed with words for `pvdrivers serve`; ended with the test. The run directory is on tmpfs."""
    with ExitStack() as stack:
        top = Path(stack.enter_context(TemporaryDirectory(dir="/dev/shm", prefix="pv-service-")))

        def make(*words: str) -> Bed:
            return stack.enter_context(Bed(top / "run", *words))

        yield make


@pytest.fixture(scope="module")
def shared() -> Iterator[Bed]:
    """One embedded Xen with a daemon, for all tests of a file that leave it as it was."""
    with TemporaryDirectory(dir="/dev/shm", prefix="pv-service-") as top:
        with Bed(Path(top) / "run") as bed:
            bed.serve()
            yield bed
            assert "our own fault" not in bed.log.read_text(), bed.log.read_text()


def cli(bed: Bed, verb: str, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """A command line on the bed's run directory, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "pvdrivers", verb, "--run-dir", str(bed.run_dir), *words],
        capture_output=True, text=True, timeout=timeout, env={**os.environ}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
