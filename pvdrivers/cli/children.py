"""The processes of a demonstration: ``pvdrivers`` verbs on one run directory, ended with the one that started them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from pvdrivers.errors import PvError

_START = 300.0  # seconds: at the first start all kernels are compiled, by two processes at once
_END = 10.0
_LINES = 20  # of what a child said, when something went wrong


class _Child:
    def __init__(self, verb: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.verb, self.process, self.log = verb, process, log


class Children:
    """A context manager: ends what was started, last first, and leaves nothing running."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._children: list[_Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A second Ctrl-C must not leave half of them.
        before = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            for child in reversed(self._children):
                _end(child)
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def start(self, verb: str, *options: str) -> None:
        """launch() and ready()."""
        self.launch(verb, *options)
        self.ready(verb)

    def launch(self, verb: str, *options: str) -> None:
        """Run ``pvdrivers <verb>`` on the run directory; returns at once."""
        log = self._run_dir.parent / f"{verb}.log"
        command = [sys.executable, "-m", "pvdrivers", verb, "--run-dir", os.fspath(self._run_dir), *options]
        with log.open("ab") as out:
            # In a group of its own: Ctrl-C is for this process, which ends the others in order.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=out, process_group=0
            )
        self._children.append(_Child(verb, process, log))

    def ready(self, verb: str) -> None:
        """Wait until the last one of this verb says that it is ready. Raises PvError with what it said."""
        process = [child.process for child in self._children if child.verb == verb][-1]
        assert process.stdout is not None
        deadline = time.monotonic() + _START
        while time.monotonic() < deadline:
            if select.select([process.stdout], [], [], 0.2)[0]:
                if process.stdout.readline().startswith(b"ready"):
                    return
                break
        raise PvError(f"`pvdrivers {verb}` did not start")

    def kill(self, verb: str) -> None:
        """SIGKILL, as if it had crashed."""
        for child in [child for child in self._children if child.verb == verb]:
            child.process.kill()
            child.process.wait()
            _close(child)
            self._children.remove(child)

    def dead(self) -> list[str]:
        """Those that have ended by themselves."""
        return [child.verb for child in self._children if child.process.poll() is not None]

    def show(self, to: IO[str]) -> None:
        """The last lines that each has written to its standard error."""
        for child in self._children:
            try:
                lines = child.log.read_text(errors="replace").splitlines()[-_LINES:]
            except OSError:
                continue
            status = child.process.poll()
            if lines or status is not None:
                print(f"--- pvdrivers {child.verb}{'' if status is None else f', status {status}'}", *lines, sep="\n",
                      file=to)  # fmt: skip


def _end(child: _Child) -> None:
    if child.process.poll() is None:
        child.process.terminate()
        try:
            child.process.wait(_END)
        except subprocess.TimeoutExpired:
            child.process.kill()
    child.process.wait()
    _close(child)


def _close(child: _Child) -> None:
    if child.process.stdout is not None:
        child.process.stdout.close()
