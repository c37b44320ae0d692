"""Counting what a backend asks of Xen and of Linux: hypercalls by xentrace, system calls by the kernel's tracepoints.

Neither is ours: xentrace reads Xen's own trace buffers (xen/include/public/trace.h), and the tracepoint
raw_syscalls:sys_enter counts in the kernel. So a backend in the kernel, QEMU and our daemon are counted alike.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

TRC_SCHED_SWITCH = 0x0002800A  # previous domain and vcpu, next domain and vcpu
TRC_PV_HYPERCALL_V2 = 0x0020100D  # number of the hypercall, then some of its arguments
TRC_PV_HYPERCALL_SUBCALL = 0x0020200E  # the same within a multicall
TRC_LOST_RECORDS = 0x0001F001
TRC_TRACE_CPU_CHANGE = 0x0001F003  # written by xentrace: cpu, bytes that follow of it

HYPERVISOR_grant_table_op = 20
HYPERVISOR_event_channel_op = 32
_OP_MASK = 0x000FFFFF  # the rest tells which arguments follow
_MASK = "0x0022b000"  # scheduling and PV, entries and subcalls: xentrace takes one mask
_TOOL = "/usr/lib/xen-4.17/bin/xentrace"
_TRACING = Path("/sys/kernel/tracing")


@dataclass
class Hypercalls:
    """What one domain asked of Xen in some span of time."""

    calls: Counter[int] = field(default_factory=Counter)
    """By number of the hypercall."""
    grant_ops: int = 0
    """Operations within the grant-table calls: each call names a number of them."""
    lost: int = 0
    """Records that Xen had no room for: the counts are too low then."""

    @property
    def grant_calls(self) -> int:
        return self.calls[HYPERVISOR_grant_table_op]

    @property
    def event_calls(self) -> int:
        return self.calls[HYPERVISOR_event_channel_op]


def records(raw: bytes) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(cpu, event, words) of a file that xentrace wrote. The cpu is that of the block that a record is in."""
    at, cpu = 0, -1
    while at + 4 <= len(raw):
        (head,) = struct.unpack_from("<I", raw, at)
        at += 4 + (8 if head >> 31 else 0)
        n = head >> 28 & 7
        words = struct.unpack_from(f"<{n}I", raw, at) if at + 4 * n <= len(raw) else ()
        at += 4 * n
        event = head & 0x0FFFFFFF
        if event == TRC_TRACE_CPU_CHANGE:
            cpu = words[0]
        else:
            yield cpu, event, words


def count(raw: bytes, domid: int) -> Hypercalls:
    """What domain `domid` asked, in a trace that has scheduling and PV events."""
    found = Hypercalls()
    running: dict[int, int] = {}
    for cpu, event, words in records(raw):
        if event == TRC_SCHED_SWITCH and len(words) >= 4:
            running[cpu] = words[2]
        elif event == TRC_LOST_RECORDS and words:
            found.lost += words[0]
        elif event in (TRC_PV_HYPERCALL_V2, TRC_PV_HYPERCALL_SUBCALL) and words and running.get(cpu) == domid:
            op = words[0] & _OP_MASK
            found.calls[op] += 1
            if op == HYPERVISOR_grant_table_op and len(words) >= 3:
                found.grant_ops += words[2]
    return found


def table(title: str, head: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown, of which each line is printed as it is made: a row takes minutes."""
    lines = [f"## {title}\n"]
    print(f"\n{lines[0]}", flush=True)
    for row in chain((head, ["---"] * len(head)), rows):
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


class Trace:
    """A running xentrace; `raw` once it has been stopped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        command = [_TOOL, "-D", "-S", "4096", "-e", _MASK, str(path)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(0.5)
        if self._process.poll() is not None:
            raise RuntimeError(f"xentrace: {self._process.communicate()[1].decode().strip()}")
        self.raw = b""

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.communicate(timeout=30)
            self.raw = self._path.read_bytes()
            self._path.unlink()


@contextmanager
def tracing(directory: Path) -> Iterator[Trace]:
    """Trace while the block runs."""
    trace = Trace(directory / f"xentrace.{os.getpid()}")
    try:
        yield trace
    finally:
        trace.stop()


@contextmanager
def system_calls(pid: int) -> Iterator[Counter[int]]:
    """Count the system calls of a process, all its threads, while the block runs: by number of the call."""
    if not (_TRACING / "events").is_dir():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", str(_TRACING)], check=True)
    event = _TRACING / "events/raw_syscalls/sys_enter"
    trigger = "hist:keys=common_pid,id:size=4096"
    counted: Counter[int] = Counter()
    (event / "trigger").write_text(trigger)
    try:
        yield counted
        text = (event / "hist").read_text()
    finally:
        (event / "trigger").write_text("!" + trigger)
    threads = {int(name) for name in os.listdir(f"/proc/{pid}/task")}
    for line in text.splitlines():
        # { common_pid: 171, id: 426 } hitcount: 1234
        words = line.replace(",", " ").replace("{", " ").replace("}", " ").split()
        if len(words) >= 6 and words[0] == "common_pid:" and words[-2] == "hitcount:":
            if int(words[1]) in threads:
                counted[int(words[3])] += int(words[-1])
