"""`pvdrivers serve` as a process of dom0."""

from __future__ import annotations

import itertools
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from .system import RESULTS, logs

READY = 180.0
"""Seconds for all kernels to be loaded under emulation."""
_numbers = itertools.count(1)


class Serve:
    """A daemon that is ready. A context manager; its log is kept in the results.

    `words` are for the command line; `environment` adds variables.
    """

    def __init__(self, *words: str, run_dir: Path | None = None, **environment: str) -> None:
        self.run_dir = run_dir or Path("/run/pvdrivers")
        self.words = ["serve", "--run-dir", str(self.run_dir), *words]
        self.environment = environment
        self.log = RESULTS / f"serve-{next(_numbers)}.log"
        logs[self.log.name] = self.log
        self.start()

    def start(self) -> float:
        """Start it, again perhaps; seconds until it was ready."""
        began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pvdrivers", *self.words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **self.environment},
        )  # fmt: skip
        self._logger = threading.Thread(target=self._write_log, args=(self.process.stderr,), daemon=True)
        self._logger.start()
        line = self._first_line(began + READY)
        if not line.startswith("ready"):
            self.kill()
            raise AssertionError(f"serve is not ready: {line!r}\n{self.log.read_text()[-4000:]}")
        self.ready_in = time.monotonic() - began
        with self.log.open("a") as log:
            log.write(f"[{time.monotonic():.3f}] --- ready in {self.ready_in:.1f} s: {line}")
        return self.ready_in

    def _write_log(self, lines: IO[bytes]) -> None:
        """Its log, with the times that dmesg shows, too."""
        with self.log.open("a") as log, lines:
            log.write(f"--- {' '.join(self.words)}\n")
            for line in lines:
                log.write(f"[{time.monotonic():.3f}] {line.decode(errors='replace')}")
                log.flush()

    def _first_line(self, end: float) -> str:
        assert self.process.stdout is not None
        while time.monotonic() < end:
            if select.select([self.process.stdout], [], [], 0.5)[0]:
                return self.process.stdout.readline().decode()
        return ""

    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def kill(self) -> None:
        """As a power cut would: SIGKILL, and wait until the kernel has taken it away."""
        self._end(signal.SIGKILL)

    def stop(self, seconds: float = 60) -> int:
        """In order, by SIGTERM; the exit status."""
        return self._end(signal.SIGTERM, seconds)

    def _end(self, number: int, seconds: float = 60) -> int:
        if self.alive():
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)
            raise AssertionError(f"serve did not end in {seconds} s\n{self.log.read_text()[-4000:]}") from None
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
            self._logger.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logs.pop(self.log.name, None)
        self.stop()
