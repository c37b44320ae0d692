"""Programs of dom0 with a bound on their time, xenstore by its command line tools, and waiting."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

RESULTS = Path(os.environ.get("BED_RESULTS", "/tmp"))
"""What is put here is there after the machine has gone."""
logs: dict[str, Path] = {}
"""Logs of what runs at the moment, shown with a test that fails."""


class CommandError(Exception):
    """A program of dom0 or a command in a guest failed or did not end; `output` is what it printed."""

    def __init__(self, what: str, status: int | None, output: str) -> None:
        ended = "did not end in time" if status is None else f"status {status}"
        super().__init__(f"{what}: {ended}\n{output[-4000:]}")
        self.status, self.output = status, output


def sh(*words: str | Path, seconds: float = 60, check: bool = True) -> str:
    """What a program printed, both streams. Raises CommandError when it fails, or takes longer."""
    try:
        # Into a file: daemons that a program leaves behind would keep a pipe open.
        with open(f"/tmp/sh-{os.getpid()}-{time.monotonic_ns()}", "w+b") as out:
            os.unlink(out.name)
            done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=seconds)
            out.seek(0)
            text = out.read().decode(errors="replace")
    except subprocess.TimeoutExpired as e:
        raise CommandError(" ".join(map(str, words)), None, f"(more than {seconds} s)") from e
    if check and done.returncode != 0:
        raise CommandError(" ".join(map(str, words)), done.returncode, text)
    return text


def until(condition: Callable[[], T], seconds: float, what: str, pause: float = 0.1) -> T:
    """Wait for a condition; what it gave. Raises AssertionError that says what was waited for."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(pause)


def read(path: str) -> str | None:
    """A node of xenstore, or None where there is none."""
    done = subprocess.run(["xenstore-read", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20)
    return done.stdout.decode()[:-1] if done.returncode == 0 else None


def write(**nodes: str) -> None:
    """Nodes of xenstore: paths are not names of Python, so: write(**{"/a/b": "1"})."""
    sh("xenstore-write", *(word for pair in nodes.items() for word in pair))


def listing(path: str) -> list[str]:
    """Names below a node; empty where there is none."""
    done = subprocess.run(["xenstore-list", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20)
    return done.stdout.decode().split()


def dump(path: str) -> str:
    """A subtree, for messages."""
    return sh("xenstore-ls", "-f", path, check=False)
