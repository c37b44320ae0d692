"""A process that measures on command: a line of JSON in, a line of JSON out.

What is measured runs in processes of its own, and so does each end: the one that keeps the books sleeps in a read
meanwhile. The first line tells an agent what it is to be (tokens do not belong on a command line); then each line is
a command. An agent whose standard input ends, ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

from pvdrivers.closing import Closing

from .machine import cpu_seconds, on_cpus

__all__ = ["Agent", "AgentError", "Answer", "Spent", "answer"]

Answer = Callable[[dict[str, Any]], dict[str, Any]]
_PATIENCE = 120.0
"""Seconds for an answer beyond what the command itself takes: an agent may have to compile first."""


class AgentError(Exception):
    """An agent ended or failed; what it said is in the text or above it."""


class Agent(Closing):
    """The side of an agent that commands. A context manager that ends it."""

    def __init__(
        self, module: str, setup: dict[str, Any], cpus: Collection[int] | None = None, *, wait: bool = True
    ) -> None:
        """Start ``python -m module`` on these cores. Returns when it is ready; raises AgentError.

        Without `wait` it returns at once, and hear() waits.
        """
        with on_cpus(cpus):
            self.process = subprocess.Popen(
                [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        self.module = module
        try:
            self.tell(setup)
            if wait:
                self.hear()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, command: dict[str, Any], seconds: float = 0.0) -> dict[str, Any]:
        """One command that takes `seconds`, and the answer. Raises AgentError."""
        self.tell(command)
        return self.hear(seconds)

    def tell(self, command: dict[str, Any]) -> None:
        """One command; hear() has the answer. Raises AgentError."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise AgentError(f"{self.module}: ended with {self.process.wait()}") from None

    def hear(self, seconds: float = 0.0) -> dict[str, Any]:
        """The answer to the command before. Raises AgentError."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds + _PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            raise AgentError(f"{self.module}: {'no answer' if not ready else 'ended without one'}")
        reply: dict[str, Any] = json.loads(line)
        if "failure" in reply:
            raise AgentError(f"{self.module}: {reply['failure']}")
        return reply

    def close(self) -> None:
        """End it. Harmless a second time."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if not self.process.stdin.closed:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Spent:
    """CPU time of several processes from here on, in seconds."""

    def __init__(self, *pids: int) -> None:
        self._pids = (os.getpid(), *pids)
        self._before = [cpu_seconds(pid) for pid in self._pids]

    def seconds(self) -> float:
        return sum(cpu_seconds(pid) - before for pid, before in zip(self._pids, self._before))


def answer(start: Callable[[dict[str, Any]], tuple[Answer, Callable[[], None]]]) -> int:
    """The agent's side: `start` makes of the first line what answers the others, and what ends it all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that commands gets it, and closes our input
    ended: Callable[[], None] = _nothing
    handle: Answer | None = None
    try:
        for line in sys.stdin:
            command = json.loads(line)
            try:
                if handle is None:
                    handle, ended = start(command)
                    reply: dict[str, Any] = {"ready": time.monotonic()}
                else:
                    reply = handle(command)
            except Exception as error:
                reply = {"failure": f"{type(error).__name__}: {error}"}
            print(json.dumps(reply), flush=True)
            if "failure" in reply:
                return 1
    finally:
        ended()
    return 0


def _nothing() -> None:
    pass
