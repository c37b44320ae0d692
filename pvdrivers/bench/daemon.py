"""`pvdrivers bench daemon`: what the backend process costs when nothing happens, and how soon it is there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import report
from .bed import Bed
from .machine import cpu_seconds, load_note, private_bytes

__all__ = ["run"]

STARTS = 5
WARM_SECONDS, COLD_SECONDS = 1.5, 30.0
DISKS, GUESTS = 100, 5
IDLE_SECONDS = 20.0
IDLE_SECONDS_QUICK = 10.0
IDLE_PERCENT = 1.0
MIB = 1 << 20
BASE_MIB, DISK_MIB = 150.0, 0.25
_SETTLE = 5.0
_GUEST_MIB = 128

Say = Callable[[str], None]


def run(
    quick: bool = False, *, disks: int = DISKS, cold: bool = True, say: Say = lambda line: None
) -> list[dict[str, Any]]:
    """The rows, in the form of report.py. `cold`: have everything compiled once for an empty cache."""
    rows: list[dict[str, Any]] = []

    def told(row: dict[str, Any]) -> None:
        rows.append({**row, "note": row.get("note") or load_note()})
        say(report.text(rows[-1:]).splitlines()[-1])

    told(_warm_start())
    if cold:
        told(_cold_compile())
    for row in _idle(disks, IDLE_SECONDS_QUICK if quick else IDLE_SECONDS):
        told(row)
    return rows


def _warm_start() -> dict[str, Any]:
    """From the start of the process to the line that it is ready, with all kernels in the cache and in an image."""
    subprocess.run([sys.executable, "-m", "pvdrivers", "warm"], check=True, stdout=subprocess.DEVNULL)
    with Bed() as bed:
        seconds = []
        for _ in range(STARTS):
            bed.stop_serve()
            seconds.append(bed.start_serve())
    return report.row_of_values("warm start of serve to ready", seconds, unit="s", target=WARM_SECONDS)


def _cold_compile() -> dict[str, Any]:
    """All that `pvdrivers warm` compiles, into an empty cache: time on the clock and CPU time."""
    with tempfile.TemporaryDirectory(prefix="pvdrivers-bench-") as cache:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "pvdrivers", "warm"], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
            env={**os.environ, "PVDRIVERS_CACHE_DIR": cache},
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
    if process.returncode:
        raise RuntimeError(f"pvdrivers warm ended with {process.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    note = "; ".join(filter(None, [f"{cpu:.1f} s of CPU", load_note()]))
    return report.row_of_values("cold compile of everything", [seconds], unit="s", target=COLD_SECONDS, note=note)


def _idle(disks: int, seconds: float) -> list[dict[str, Any]]:
    """A daemon with connected disks that nobody uses: its CPU, its memory."""
    with Bed(workers=None) as bed:
        time.sleep(1.0)
        bare = private_bytes(bed.pid) / MIB
        share = -(-disks // GUESTS)
        for first in range(0, disks, share):
            bed.guest(bed.disks(["null:64M"] * min(share, disks - first), memory_mib=_GUEST_MIB))
        time.sleep(_SETTLE)
        before, began = cpu_seconds(bed.pid), time.monotonic()
        time.sleep(seconds)
        percent = (cpu_seconds(bed.pid) - before) / (time.monotonic() - began) * 100
        memory = private_bytes(bed.pid) / MIB
        resident = _resident_mib(bed.pid)
    each = (memory - bare) * 1024 / disks
    what = f"idle daemon, {disks} connected disks"
    return [
        report.row_of_values(f"{what}: CPU", [percent], unit="% of a core", target=IDLE_PERCENT, seconds=seconds),
        report.row_of_values(
            f"{what}: private memory", [memory], unit="MiB", target=BASE_MIB + DISK_MIB * disks, bare_mib=bare,
            resident_mib=resident, note=f"{bare:.0f} MiB without disks, {each:.0f} KiB a disk, resident {resident:.0f}",
        ),
    ]  # fmt: skip


def _resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) / 1024
    return float("nan")
