"""The disk that is taken away is the one that is busy: by xl's block-detach, and with --force.

What its guest makes of it is the guest's: its I/O fails, or waits for ever. Here is what the others have to see of it:
nothing. Another disk of the same guest and another guest go on verified, the daemon lets go, and the image is whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from .guests import Guest, Job, disk, kernels
from .lives import Yard
from .load import verified
from .stores import Stores, checksum
from .system import RESULTS, read, sh, until

LIBXL_WAITS = 10.0
FIO = (
    "fio --ioengine=io_uring --direct=1 --rw=randwrite --bssplit=4k/50:64k/50 --iodepth=32 --size=8m --time_based"
    " --runtime=600 --name=busy --filename={}"
)
FILES = (
    "mkfs.ext4 -q -F /dev/xvdb && mount /dev/xvdb /mnt && echo kept > /mnt/kept && sync &&"
    f" {FIO.format('/mnt/file')} --fsync=16"
)
USES = {"device": FIO.format("/dev/xvdb"), "filesystem": FILES}


def writes(here: Yard, name: str) -> int:
    """How many the daemon has served for a disk."""
    [row] = [row for row in here.devices(int(name.split("-")[1])) if row["device"] == name]
    return sum(queue["requests"]["write"] for queue in row["queues"])


def told(what: str, took: float, one: Guest, job: Job) -> None:
    """What the guest made of it, for the results."""
    state = "still waits" if job.running() else "has ended"
    kernel = one.ask("dmesg | grep -E 'xvdb|vbd-51728' | tail -n 4")[1]
    text = f"{what}: xl took {took:.1f} s; the guest's program {state}; its kernel: {kernel}"
    print(text)
    with (RESULTS / "detach.md").open("a") as out:
        print(f"* {text}", file=out)


@pytest.mark.parametrize(
    ("kernel", "force", "use"),
    [
        pytest.param(kernel, force, use, id=f"{kernel}-{'forced' if force else 'asked'}-{use}")
        for kernel in kernels()
        for force in (False, True)
        for use in USES
        if kernel == "debian" or (use, force) == ("filesystem", False)
    ],
)
def test_the_busy_disk_is_taken_away(
    here: Yard, guest: Callable[..., Guest], stores: Stores, kernel: str, force: bool, use: str
) -> None:
    image = stores.file("taken", 32)
    one = guest(disk(stores.file("stays", 16)), disk(image, "xvdb"), kernel=kernel)
    domid, name = one.domid, f"vbd-{one.domid}-51728"
    where = f"/local/domain/0/backend/vbd/{domid}/51728"
    with verified(one, "xvda", depth=4, mib=2) as stays:
        job = one.start(USES[use])
        until(lambda: writes(here, name) > 50, 60, "the disk is busy", pause=0.5)
        assert job.running()
        began = time.monotonic()
        said = one.xl("block-detach", "xvdb", options=["--force"] if force else [], check=False)
        took = time.monotonic() - began
        print(said)
        until(lambda: all(row["device"] != name for row in here.devices(domid)), 30, f"{name} is let go")
        assert took < LIBXL_WAITS and "unable" not in said, (took, said)
        assert read(f"{where}/state") is None
        told(f"{kernel}, {use}, {'forced' if force else 'asked'}", took, one, job)
        stays.wait_progress()
        stays.check()
        here.check_unnoticed()
        if use == "filesystem":  # as after the loss of power: the journal is replayed, and what was synced is there
            sh("e2fsck", "-fp", image, check=False)
            sh("e2fsck", "-fn", image)
            assert sh("debugfs", "-R", "cat /kept", image).splitlines()[-1] == "kept"
        # Nobody holds the image: the other guest has it at once.
        here.neighbour.xl("block-attach", disk(image, "xvdb"))
        here.neighbour.run("until [ -b /dev/xvdb ]; do usleep 100000; done", seconds=30)
        assert here.neighbour.run("sha256sum < /dev/xvdb").split()[0] == checksum(image)
        here.neighbour.xl("block-detach", "xvdb")
        here.neighbour.run("while [ -b /dev/xvdb ]; do usleep 100000; done", seconds=30)
    one.destroy()
    here.check_gone(domid)
