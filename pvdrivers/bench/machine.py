"""The machine that is measured on: its cores, what it is, and what a process of it costs."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["Missing", "cpu_seconds", "describe", "load_note", "on_cpus", "private_bytes", "program", "two_cpus"]

_TICK = os.sysconf("SC_CLK_TCK")
_QUIET = 2.5
"""The load that two measured processes and their parent make themselves."""


class Missing(Exception):
    """What a row needs is not on this machine; the text says what to install."""


def program(name: str, package: str) -> str:
    """The path of a program. Raises Missing with Debian's package."""
    found = shutil.which(name)
    if found is None:
        raise Missing(f"{name} is not installed (apt-get install {package})")
    return found


def two_cpus() -> tuple[int, int]:
    """Two cores that this process may use, or the only one twice."""
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[0], cpus[1 % len(cpus)]


@contextlib.contextmanager
def on_cpus(cpus: Collection[int] | None) -> Iterator[None]:
    """Processes that are started here run on these cores only; None: where this one may."""
    home = os.sched_getaffinity(0)
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, home)


def cpu_seconds(pid: int | str) -> float:
    """User and system time of a process and all of its threads so far, also of those inside io_uring."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def private_bytes(pid: int) -> int:
    """Memory that would be free again without this process: its private pages, clean and dirty."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Private_Clean", "Private_Dirty"):
            total += int(rest.split()[0]) << 10
    return total


def load_note() -> str | None:
    """What to think of figures taken while others wanted the same cores; None when nobody did."""
    load = os.getloadavg()[0]
    return f"load {load:.1f}: not quiet" if load > _QUIET else None


def describe() -> dict[str, Any]:
    """Everything about this machine that somebody who reads the figures will ask for."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cpus": sorted(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: _version(name) for name in ("numba", "llvmlite", "numpy", "pvdrivers")},
        "fio": _says("fio", "--version"),
        "qemu-storage-daemon": _says("qemu-storage-daemon", "--version"),
        "command": " ".join(["pvdrivers", *sys.argv[1:]]),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _says(name: str, option: str) -> str | None:
    path = shutil.which(name)
    if path is None:
        return None
    done = subprocess.run([path, option], capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
