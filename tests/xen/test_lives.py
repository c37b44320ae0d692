"""What befalls guests: they are destroyed, crash, pause, reboot, are saved, restored and migrated, under I/O.

And a neighbour of theirs, under fio with verify on the same daemon, notices nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .guests import Guest, disk, listed
from .lives import Yard
from .load import Load, verified
from .stores import Stores, checksum
from .system import dump, until

LIBXL_WAITS = 10.0
"""Seconds that libxl waits for a backend to close; a destroy that takes as long was not answered."""


@pytest.mark.xen_quick
def test_destroyed_under_io(here: Yard, guest: Callable[..., Guest], stores: Stores) -> None:
    """Every grant is let go of at once, so that the domain does not stay as a zombie; and the image is free."""
    image = stores.file("disk", 16)
    one = guest(disk(f"{image},policy=persistent"), disk(stores.file("other", 16), "xvdb"))
    domid = one.domid
    Load(one, "xvda", "xvdb", depth=32)
    began = time.monotonic()
    one.destroy()
    assert time.monotonic() - began < LIBXL_WAITS
    here.check_gone(domid)
    another = guest(disk(image))
    assert another.run("sha256sum < /dev/xvda").split()[0] == checksum(image)


def test_crashed_under_io(here: Yard, guest: Callable[..., Guest], stores: Stores) -> None:
    one = guest(disk(stores.file("disk", 16)))
    domid = one.domid
    Load(one, "xvda", depth=32)
    one._send("echo c > /proc/sysrq-trigger")
    until(lambda: domid not in dict(listed()), 30, "the guest has crashed and is destroyed")
    here.check_gone(domid)


def test_paused_under_io(here: Yard, guest: Callable[..., Guest], stores: Stores) -> None:
    one = guest(disk(stores.file("disk", 16)))
    with verified(one, "xvda"):
        for _ in range(2):
            one.xl("pause")
            time.sleep(2)
            here.check_unnoticed()
            assert here.devices(one.domid)[0]["state"] == "Connected"
            one.xl("unpause")


def test_rebooted_under_io(here: Yard, guest: Callable[..., Guest], stores: Stores) -> None:
    """By the toolstack; what was written and synced before is there after."""
    image = stores.file("disk", 32)
    one = guest(disk(image), disk(stores.file("other", 16), "xvdb"))
    first = one.domid
    one.run("mkfs.ext4 -q -F /dev/xvda && mount /dev/xvda /mnt && head -c 3000000 /dev/urandom > /mnt/file")
    one.run("cd /mnt; sha256sum file > sum; sync")
    Load(one, "xvdb", depth=32)
    one.xl("reboot")
    one.wait_ready()
    here.check_gone(first)
    assert one.run("mount /dev/xvda /mnt; cd /mnt; sha256sum -c sum") == "file: OK"


def test_saved_and_restored_under_io(
    here: Yard, guest: Callable[..., Guest], stores: Stores, tmp_path: Path
) -> None:
    """What is in flight when it is saved goes out again from the new domain."""
    one = guest(disk(f"{stores.file('disk', 16)},policy=map"), disk(stores.file("other", 16), "xvdb"), memory=192)
    with verified(one, "xvda", "xvdb") as load:
        first = one.domid
        one.save(tmp_path / "saved")
        here.check_gone(first)
        one.restore(tmp_path / "saved")
        (tmp_path / "saved").unlink()
        assert one.domid != first
        load.wait_progress()


def test_a_checkpoint_under_io(here: Yard, guest: Callable[..., Guest], stores: Stores, tmp_path: Path) -> None:
    """Saved, and running again as the same domain: its rings are as they were, and nobody has connected anew."""
    one = guest(disk(f"{stores.file('disk', 16)},policy=map"), disk(stores.file("other", 16), "xvdb"), memory=192)
    domid, saved = one.domid, tmp_path / "saved"
    with verified(one, "xvda", "xvdb") as load:
        fronts = f"/local/domain/{domid}/device/vbd"
        rings = dump(fronts)
        states = {found["device"]: found["since"] for found in here.devices(domid)}
        for _ in range(2):
            one.checkpoint(saved)
            assert saved.stat().st_size > 50 << 20
            saved.unlink()
            load.wait_progress()
        assert one.domid == domid
        assert dump(fronts) == rings and "event-channel" in rings
        assert {found["device"]: found["since"] for found in here.devices(domid)} == states and len(states) == 2


def test_migrated_to_this_host_under_io(here: Yard, guest: Callable[..., Guest], stores: Stores) -> None:
    """Both domains have the disk for a while: the new one's waits until the old one has let go of it."""
    one = guest(disk(stores.file("disk", 16)), memory=192)
    with verified(one, "xvda") as load:
        for _ in range(2):
            first = one.domid
            one.migrate()
            assert one.domid != first
            here.check_gone(first)
            load.wait_progress()
