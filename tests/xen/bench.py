"""`make bench-xen`: one guest, one boot, and a disk each from us, from the kernel's xen-blkback and from QEMU's qdisk;
and two guests that have a network from us and one from the kernel's xen-netback (bench_net.py).

The disks are on ram disks of dom0. What is counted (hypercalls of dom0 by xentrace, our system calls by the kernel's
tracepoints) proves something; throughput under software emulation proves little, and is given as ratios, in turn in one
run. Prints Markdown; run in dom0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pvdrivers import toolstack
from pvdrivers.cli.stats import snapshot
from pvdrivers.xenbus import XenbusState
from pvdrivers.xenstore import XenStoreClient, default_path

from . import bench_net, counting
from .counting import table
from .guests import Guest
from .serve import Serve
from .system import RESULTS, sh, until

RAM_MIB = 48
NAMES = {0: "read", 1: "write", 16: "ioctl", 228: "clock_gettime", 232: "epoll_wait", 426: "io_uring_enter"}
"""Of system calls, on x86-64."""
DEPTH = 32


@dataclass
class Disk:
    """One disk of the guest, and who serves it."""

    name: str
    vdev: str
    ram: str


OURS, KERNEL, QDISK = Disk("ours", "xvdb", "ram0"), Disk("xen-blkback", "xvdc", "ram1"), Disk("qdisk", "xvdd", "ram2")
OURS_COPY = Disk("ours, policy=copy", "xvde", "ram3")
KERNEL_MAP = Disk("xen-blkback, feature_persistent=N", "xvdf", "ram4")
OURS_MAP = Disk("ours, policy=map", "xvdg", "ram5")
DISKS = (OURS, KERNEL, QDISK, OURS_COPY, OURS_MAP, KERNEL_MAP)


def prepare(stack: ExitStack) -> tuple[Guest, Serve]:
    """The ram disks, the daemon, and a guest with all disks, each used once."""
    sh("modprobe", "brd", f"rd_nr={len(DISKS)}", f"rd_size={RAM_MIB << 10}")
    sh("modprobe", "xen-blkback")
    serve = stack.enter_context(Serve("--class", "pvblk"))
    # At its creation, as xl then starts a QEMU for it.
    qdisk = f"format=raw,vdev={QDISK.vdev},access=rw,backendtype=qdisk,target=/dev/{QDISK.ram}"
    guest = stack.enter_context(Guest(qdisk, memory=256))
    pvdrivers = (sys.executable, "-m", "pvdrivers")
    run_dir = ("--run-dir", str(serve.run_dir))
    for disk, options in ((OURS, ""), (OURS_COPY, "policy=copy,"), (OURS_MAP, "policy=map,direct=no,")):
        words = f"vdev={disk.vdev},access=rw,{options}target=/dev/{disk.ram}"
        sh(*pvdrivers, "block-attach", *run_dir, str(guest.domid), words)
    # The kernel's driver reads its parameter when a disk connects.
    for disk, persistent in ((KERNEL, "Y"), (KERNEL_MAP, "N")):
        Path("/sys/module/xen_blkback/parameters/feature_persistent").write_text(persistent)
        guest.xl("block-attach", f"phy:/dev/{disk.ram},{disk.vdev},w")
        _wait(guest, disk)
    for disk in DISKS:
        _wait(guest, disk)
        guest.run(f"dd if=/dev/zero of=/dev/{disk.vdev} bs=64k oflag=direct 2>&1; true", 120)
    return guest, serve


def _wait(guest: Guest, disk: Disk) -> None:
    until(lambda: guest.ask(f"[ -b /dev/{disk.vdev} ]")[0] == 0, 60, f"{disk.name} is in the guest")


def fio(
    guest: Guest, disk: Disk, rw: str, size: str, depth: int, *, seconds: int = 0, requests: int = 0, batch: int = 0
) -> float:
    """Requests a second that fio got. It submits `batch` of them at a time, 0: half of the depth."""
    bound = f"--time_based --runtime={seconds}" if seconds else f"--number_ios={requests}"
    # One by one an emulated guest submits more slowly than any backend answers: its queue would never be deep.
    batch = batch or max(1, depth // 2)
    bound += f" --iodepth_batch_submit={batch} --iodepth_batch_complete_min={batch}"
    text = guest.run(
        f"fio --name=b --filename=/dev/{disk.vdev} --rw={rw} --bs={size} --iodepth={depth} --ioengine=io_uring"
        f" --direct=1 --norandommap --randrepeat=0 --io_size=10g --output-format=json {bound} 2>/dev/null",
        seconds=240,
    )
    job = json.loads(text[text.index("{") :])["jobs"][0]
    kind = job["read" if "read" in rw else "write"]
    assert kind["total_ios"] > 0, text
    return float(kind["iops"])


def served(guest: Guest, serve: Serve, disk: Disk) -> int:
    """Requests that a disk of ours has answered: those of fio, and what else the guest's kernel had to ask."""
    name = f"pvblk-{guest.domid}-{toolstack.devid_of(disk.vdev)}"
    found = [device for device in snapshot(serve.run_dir) if device["device"] == name]
    return sum(sum(queue["requests"].values()) for device in found for queue in device["queues"])


def counted(guest: Guest, serve: Serve, disk: Disk, rw: str, requests: int, batch: int) -> list[str]:
    """A row: what dom0 asked of Xen, and what we asked of Linux, a request."""
    fio(guest, disk, rw, "4k", DEPTH, requests=requests // 4, batch=batch)  # pages that are kept are mapped by now
    before = served(guest, serve, disk)
    with counting.tracing(Path("/tmp")) as trace, counting.system_calls(serve.process.pid) as calls:
        fio(guest, disk, rw, "4k", DEPTH, requests=requests, batch=batch)
    found = counting.count(trace.raw, 0)
    ours = ""
    if n := served(guest, serve, disk) - before:
        each = ", ".join(f"{NAMES.get(nr, nr)} {k / n:.3f}" for nr, k in calls.most_common(4))
        ours = f"{sum(calls.values()) / n:.3f} of {n} ({each})"
    lost = f" ({found.lost} records lost)" if found.lost else ""
    numbers = [found.grant_ops, found.grant_calls, found.event_calls]
    return [disk.name, f"{rw}, {batch} at a time", *(f"{n / requests:.3f}" for n in numbers), ours + lost]


def throughput(guest: Guest, rounds: int, seconds: int) -> Iterator[list[str]]:
    """Rows: the ratio ours / theirs, the median over rounds in which the disks take turns."""
    for rw, size, depth in (("randread", "4k", 1), ("randread", "4k", DEPTH), ("randwrite", "4k", 1),
                            ("randwrite", "4k", DEPTH), ("read", "64k", 8), ("write", "64k", 8)):  # fmt: skip
        got: dict[str, list[float]] = {disk.name: [] for disk in (OURS, KERNEL, QDISK)}
        for _ in range(rounds):
            for disk in (OURS, KERNEL, QDISK):
                got[disk.name].append(fio(guest, disk, rw, size, depth, seconds=seconds))
        row = [f"{rw} {size}", str(depth)]
        for other in (KERNEL, QDISK):
            ratios = sorted(a / b for a, b in zip(got[OURS.name], got[other.name]))
            row.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        yield [*row, f"{statistics.median(got[OURS.name]):.0f}"]


def starts(guest: Guest, serve: Serve, rounds: int) -> list[float]:
    """Seconds from the start of a daemon to InitWait of a disk that waits for it; the guest, paused, answers none."""
    found = []
    guest.xl("pause")
    with XenStoreClient.connect(default_path()) as store:
        for _ in range(rounds):
            serve.stop()
            path = toolstack.attach_vbd(store, guest.domid, "xvdz", f"/dev/{DISKS[-1].ram}", mode="r", kind="pvblk")
            began = time.monotonic()
            starting = threading.Thread(target=serve.start)
            starting.start()
            state = toolstack.wait_for(store, path, [XenbusState.InitWait], 180)
            found.append(time.monotonic() - began)
            starting.join()
            assert state is XenbusState.InitWait, state
            toolstack.detach(store, path, timeout=20, force=True)
    return found


def cold() -> str:
    """How long it takes to compile all that `serve` needs, and to link its image."""
    began = time.monotonic()
    sh("env", "PVDRIVERS_CACHE_DIR=/tmp/cold", sys.executable, "-m", "pvdrivers", "warm", seconds=3600)
    words = f"cold compile: {time.monotonic() - began:.0f} s"
    print(words, flush=True)
    return words


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="tests.xen.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--cold", action="store_true", help="and how long a cold compile takes: many minutes")
    parser.add_argument("--only", choices=("disks", "net", "cold"), help="one part")
    args = parser.parse_args()
    parts = [args.only] if args.only else ["disks", "net"] + ["cold"] * args.cold
    made = {"disks": lambda: disks(args.quick), "net": lambda: bench_net.run(args.quick), "cold": cold}
    text = "\n".join(made[part]() for part in parts)
    (RESULTS / "bench-xen.md").write_text(f"{time.strftime('%F')}\n\n{text}")
    return 0


def disks(quick: bool) -> str:
    """The tables, as text."""
    rounds, seconds, requests = (1, 2, 2048) if quick else (3, 4, 8192)
    with ExitStack() as stack:
        guest, serve = prepare(stack)
        head = ["disk", "work", "grant operations", "grant hypercalls", "event hypercalls", "system calls of ours"]
        # Half at a time, the guest is at work on one half while a backend is at the other; all at once, it waits.
        all_at_once = ((d, DEPTH) for d in (OURS, KERNEL))
        half = ((d, DEPTH // 2) for d in (OURS, KERNEL, OURS_COPY, OURS_MAP, KERNEL_MAP, QDISK))
        cells = [*half, *all_at_once]
        rows = (counted(guest, serve, d, rw, requests, batch) for rw in ("randread", "randwrite") for d, batch in cells)
        title = f"Counted, a request: 4 KiB, depth {DEPTH}, one vCPU, {requests} requests, all of dom0"
        text = table(title, head, rows)
        head = ["work", "depth", "ours / xen-blkback", "ours / qdisk", "ours, IOPS"]
        title = f"Throughput under emulation, {rounds} rounds of {seconds} s in turn"
        text += "\n" + table(title, head, throughput(guest, rounds, seconds))
        found = starts(guest, serve, 3 if quick else 5)
        words = f"start to InitWait, warm: {', '.join(f'{s:.1f}' for s in found)} s; to ready: {serve.ready_in:.1f} s"
        print(f"\n{words}", flush=True)
    return f"{text}\n{words}\n"


if __name__ == "__main__":
    sys.exit(main())
