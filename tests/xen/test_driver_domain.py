"""A daemon in a guest that serves another guest: `backend=NAME` in the disk's line, and no `xl devd` there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from .guests import Guest, Job, disk, listed
from .inside import python, with_project
from .load import Load, verified
from .system import dump, listing, read, sh, until

LIBXL_WAITS = 10.0
"""Seconds, for a backend to offer a disk, to close it, and to remove its directory."""


class DriverDomain:
    """A guest with the project, and a daemon in it."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.starts = 0
        self.start()

    def python(self, words: str) -> str:
        """A shell line that runs the project."""
        return python(f"-m pvdrivers {words}")

    def start(self) -> Job:
        """Start the daemon, again perhaps, and wait until it is ready."""
        self.starts += 1
        self.job = self.guest.start(
            self.python("serve > /tmp/serve.out 2>> /tmp/serve.log & echo $! > /tmp/serve.pid; wait $!")
        )
        self.guest.run("until grep -q ^ready /tmp/serve.out; do kill -0 $(cat /tmp/serve.pid); sleep 0.2; done", 180)
        return self.job

    def kill(self) -> None:
        """SIGKILL."""
        self.guest.run("rm /tmp/serve.out; kill -9 $(cat /tmp/serve.pid)")
        until(lambda: not self.job.running(), 20, "the daemon is dead")

    def image(self, name: str, mib: int = 16) -> str:
        """The path of a file in its memory, of random bytes."""
        self.guest.run(f"head -c {mib << 20} /dev/urandom > /tmp/{name}")
        return f"/tmp/{name}"

    def checksum(self, path: str) -> str:
        return self.guest.run(f"sha256sum {path}").split()[0]

    def log(self) -> str:
        return self.guest.run("cat /tmp/serve.log")

    def disk(self, image: str, vdev: str = "xvda") -> str:
        """A line of the configuration of a guest that it serves."""
        return disk(image, vdev, backend=self.guest.name)

    def backends(self) -> str:
        return f"/local/domain/{self.guest.domid}/backend/vbd"


@pytest.fixture(scope="module")
def driver(module_guest: Callable[..., Guest]) -> Iterator[DriverDomain]:
    guest = with_project(module_guest, "driver_domain=1")
    yield DriverDomain(guest)
    guest.destroy()
    sh("modprobe", "-r", "xen-blkback")


def test_what_it_is(driver: DriverDomain) -> None:
    found = driver.guest.run(driver.python("check; true"))
    assert f"domain {driver.guest.domid}: guests name it as backend= (a driver domain)" in found, found


def test_it_serves_a_guest(driver: DriverDomain, guest: Callable[..., Guest]) -> None:
    image = driver.image("disk")
    one = guest(driver.disk(image))
    assert read(f"/local/domain/{one.domid}/device/vbd/51712/backend") == f"{driver.backends()}/{one.domid}/51712"
    assert one.run("sha256sum < /dev/xvda").split()[0] == driver.checksum(image)
    one.run("mkfs.ext4 -q -F /dev/xvda && mount /dev/xvda /mnt && head -c 3000000 /dev/urandom > /mnt/file")
    one.run("cd /mnt; sha256sum file > sum; sync")
    one.reboot()
    assert one.run("mount -r /dev/xvda /mnt; cd /mnt; sha256sum -c sum; cd /; umount /mnt") == "file: OK"
    assert one.run("sha256sum < /dev/xvda").split()[0] == driver.checksum(image)


def test_it_is_killed_under_io(driver: DriverDomain, guest: Callable[..., Guest]) -> None:
    one = guest(driver.disk(driver.image("disk")))
    with verified(one, "xvda") as load:
        for _ in range(2):
            driver.kill()
            driver.start()
            load.wait_progress()


def test_disks_come_and_go(driver: DriverDomain, guest: Callable[..., Guest]) -> None:
    """And nobody waits: the directory that libxl leaves to the driver domain is removed there."""
    one = guest()
    image = driver.image("other", 8)
    for _ in range(2):
        one.xl("block-attach", driver.disk(image, "xvdb"))
        one.run("until [ -b /dev/xvdb ]; do usleep 100000; done", seconds=20)
        assert one.run("sha256sum < /dev/xvdb").split()[0] == driver.checksum(image)
        began = time.monotonic()
        told = one.xl("block-detach", "xvdb", seconds=60)
        assert time.monotonic() - began < LIBXL_WAITS, told
        assert "timed out" not in told and "unable" not in told
        assert "51728" not in listing(f"{driver.backends()}/{one.domid}"), dump(driver.backends())


def test_more_disks_than_a_domain_may_have_transactions(driver: DriverDomain, guest: Callable[..., Guest]) -> None:
    """xenstored lets a domain other than dom0 have ten open at once: at their making, and when all are taken over."""
    images = {f"xvd{letter}": driver.image(f"many-{letter}", 1) for letter in "abcdefghijklmn"}
    one = guest(*(driver.disk(image, vdev) for vdev, image in images.items()))
    before = driver.log()
    driver.kill()
    driver.start()
    for vdev, image in images.items():
        one.run(f"dd if=/dev/urandom of=/dev/{vdev} bs=64k count=4 conv=fsync 2>/dev/null", 60)
        assert one.run(f"sha256sum < /dev/{vdev}").split()[0] == driver.checksum(image)
    said = driver.log()[len(before) :]
    assert said.count("taken over from a process that ended") == len(images), said
    assert "ENOSPC" not in driver.log() and "No space left" not in driver.log() and "EAGAIN" not in said, driver.log()


def test_a_guest_is_destroyed_under_io(driver: DriverDomain, guest: Callable[..., Guest]) -> None:
    one = guest(driver.disk(driver.image("disk")))
    domid = one.domid
    Load(one, "xvda", depth=32)
    began = time.monotonic()
    told = one.xl("destroy")
    assert time.monotonic() - began < LIBXL_WAITS, told
    assert "timed out" not in told and "unable" not in told, told
    until(lambda: domid not in dict(listed()), 10, "the domain is gone, with no page of it held")
    until(lambda: str(domid) not in listing(driver.backends()), 10, "its directory is gone")
    assert "no device is there" in driver.guest.run(driver.python("stats"))
