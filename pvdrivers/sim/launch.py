"""Start an embedded Xen of one's own, for a demonstration or a test."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

from pvdrivers.closing import Closing
from pvdrivers.errors import PlatformError


class EmbeddedXen(Closing):
    """A ``pvdrivers sim`` process; a context manager that ends it."""

    def __init__(self, run_dir: Path, *, memory_mib: int | None = None, timeout: float = 30.0) -> None:
        """Returns when programs may join. Raises PlatformError if that is not within `timeout` seconds."""
        self.run_dir = run_dir
        memory = [] if memory_mib is None else ["--memory", str(memory_mib)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pvdrivers", "sim", "--run-dir", os.fspath(run_dir), *memory],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        if not ready or not self.process.stdout.readline().startswith(b"ready"):
            self.close()
            raise PlatformError(f"the embedded Xen at {run_dir} did not start; what it said is above")

    def close(self) -> int:
        """End it and return its exit status, 0 if it ended in order. Harmless a second time."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return self.process.wait()
