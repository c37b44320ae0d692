"""A newer daemon takes over while a guest of Linux writes and verifies; a successor that dies gives all back."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pvdrivers import daemons

from .guests import Guest, Job, disk, kernels
from .serve import Serve
from .stores import Stores
from .system import RESULTS, CommandError, sh, until

UPGRADES = 5
PAUSE = re.compile(r"^(\S+): paused for ([0-9.]+) ms$", re.MULTILINE)
LONGEST = 60.0
"""Seconds: pauses are reported, and say little under emulation; one as long as a take-over may take is an outage."""
FIO = (
    "fio --ioengine=io_uring --direct=1 --iodepth=8 --rw=randwrite --bssplit=4k/50:16k/30:64k/20 --verify=crc32c"
    " --verify_fatal=1 --exitall_on_error=1 --thinktime=100000 --thinktime_blocks=48 --size={size} {words}"
    " --name=a --filename=/dev/xvda --name=b --filename=/dev/xvdb"
)
"""Two disks; it rests now and then, or a new daemon would take minutes to start beside it under emulation."""


def load(guest: Guest, mib: int = 2) -> Job:
    """Passes of writes, each read back at once and again at the end, until /tmp/stop is there."""
    passes = FIO.format(size=f"{mib}m", words="--verify_backlog=32 --randseed=$n")
    again = FIO.format(size=f"{mib}m", words="--verify_only --randseed=$n")
    return guest.start(
        f"n=1; while :; do {passes} || exit 1; echo pass $n; [ -e /tmp/stop ] && break; n=$((n + 1)); done; {again}"
    )


def requests(guest: Guest) -> list[int]:
    """How many requests of each disk have been answered, by the guest's own count."""
    lines = guest.run("cat /sys/block/xvda/stat /sys/block/xvdb/stat").splitlines()
    return [int(line.split()[0]) + int(line.split()[4]) for line in lines]


def goes_on(guest: Guest, daemon: Serve, job: Job) -> None:
    """Both disks are being used, and answer."""
    assert job.running(), job.wait(1)
    before = requests(guest)
    try:
        until(lambda: all(b > a for a, b in zip(before, requests(guest))), 60, f"requests beyond {before}", pause=0.5)
    except AssertionError as e:
        where = ("stats", "--run-dir", str(daemon.run_dir))
        told = [sh(sys.executable, "-m", "pvdrivers", *where, *words) for words in ((), ("--inflight",))]
        raise AssertionError("\n".join([str(e), *told])) from None


def check_unnoticed(guest: Guest, job: Job) -> int:
    """Ends the load; how often all was written."""
    guest.run("touch /tmp/stop")
    output = job.wait(200)
    assert "verify:" not in output and "err= 0" in output, output
    errors = guest.ask("dmesg | grep -i -E 'i/o error|blkfront.*(error|closed)|xvd[ab].*timeout'")[1]
    assert errors == "", errors
    return output.count("\npass ")


@pytest.fixture
def serve_and_successors(serve: Callable[..., Serve]) -> Iterator[Callable[..., Serve]]:
    """Starts daemons; those that have taken over from them end with the test, too."""
    made: list[Serve] = []

    def start(*words: str, **environment: str) -> Serve:
        made.append(serve(*words, **environment))
        return made[-1]

    yield start
    for daemon in made:
        for pid in successors(daemon):
            os.kill(pid, signal.SIGTERM)
        until(partial(lambda d: not successors(d), daemon), 60, "successors end")


def successors(daemon: Serve) -> list[int]:
    """Processes that run on its directory, but for the one that was started."""
    return [found.pid for found in daemons.running(daemon.run_dir) if found.pid != daemon.process.pid]


def upgrade(daemon: Serve, *words: str) -> str:
    """What the command printed. Raises CommandError if it failed."""
    where = ("--run-dir", str(daemon.run_dir), "--timeout", "300")
    return sh(sys.executable, "-m", "pvdrivers", "upgrade", *where, *words, seconds=400)


def running(daemon: Serve) -> int:
    (found,) = daemons.running(daemon.run_dir)
    return found.pid


def disks(stores: Stores) -> list[str]:
    """A block device with direct I/O, and memory that is copied."""
    return [disk(stores.loop(stores.file("disk", 64)), "xvda"), disk("memory:16M,policy=copy", "xvdb")]


def test_five_upgrades_under_verified_io(
    serve_and_successors: Callable[..., Serve], guest: Callable[..., Guest], stores: Stores
) -> None:
    daemon = serve_and_successors()
    one = guest(*disks(stores), kernel=kernels()[-1], vcpus=2)
    job = load(one)
    goes_on(one, daemon, job)
    before, said = running(daemon), []
    for number in range(1, UPGRADES + 1):
        output = upgrade(daemon)
        pauses = {name: float(ms) / 1000 for name, ms in PAUSE.findall(output)}
        assert len(pauses) == 2 and max(pauses.values()) < LONGEST, output
        after = running(daemon)
        assert after != before
        before = after
        said.append(f"pause: upgrade {number}: {max(pauses.values()):.3f} s")
        print(said[-1], flush=True)
        goes_on(one, daemon, job)
    with (RESULTS / "pauses.md").open("a") as out:
        out.write("".join(f"{line}\n" for line in said))
    passes = check_unnoticed(one, job)
    print(f"{passes} passes of writes under {UPGRADES} upgrades")
    assert daemon.process.wait(10) == 0


DIES = """
import os
if "PVDRIVERS_SUCCESSOR_LINK" in os.environ:
    os.environ["PVDRIVERS_TEST_KILL"] = "3:1"
"""


def test_a_successor_that_dies_while_it_takes_over(
    serve_and_successors: Callable[..., Serve], guest: Callable[..., Guest], stores: Stores, tmp_path: Path
) -> None:
    """It has mapped a ring, taken its requests and begun with them; the old one has all of it again."""
    daemon = serve_and_successors(PYTHONPATH=str(tmp_path))
    one = guest(*disks(stores), vcpus=2)
    job = load(one)
    goes_on(one, daemon, job)
    there = running(daemon)
    (tmp_path / "sitecustomize.py").write_text(DIES)
    with pytest.raises(CommandError, match="status -9.*it serves on"):
        upgrade(daemon)
    assert running(daemon) == there
    goes_on(one, daemon, job)
    check_unnoticed(one, job)
