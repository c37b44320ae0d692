"""The bed itself: guests of each kernel with disks of the kernel's own xen-blkback, so that a fault of ours is ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .guests import Guest, kernels
from .stores import Stores, checksum
from .system import CommandError, sh


@pytest.fixture(autouse=True)
def kernel_backend() -> Iterator[None]:
    """xen-blkback, for these tests only: where it is loaded it takes every disk."""
    sh("modprobe", "xen-blkback")
    yield
    sh("modprobe", "-r", "xen-blkback")


@pytest.mark.xen_quick
def test_a_guest_reads_and_writes_a_disk_of_the_kernels(guest: Callable[..., Guest], stores: Stores) -> None:
    image = stores.file("disk", 16, random=True)
    one = guest(f"phy:{stores.loop(image)},xvda,w")
    assert one.run("sha256sum < /dev/xvda").split()[0] == checksum(image)
    one.run("echo written > /tmp/x; dd if=/tmp/x of=/dev/xvda bs=512 conv=sync,fsync oflag=direct iflag=fullblock")
    assert image.read_bytes()[:8] == b"written\n"


@pytest.mark.parametrize("kernel", kernels())
def test_a_guest_boots_from_its_root_disk_and_again(
    guest: Callable[..., Guest], stores: Stores, kernel: str
) -> None:
    image = stores.copy(Path("/bed/guest-root.ext4"), "root")
    one = guest(f"phy:{stores.loop(image)},xvda,w", kernel=kernel, root="/dev/xvda")
    assert one.run("mount | grep ' / '").startswith("/dev/xvda on / type ext4 (rw")
    first = one.domid
    one.run("head -c 3000000 /dev/urandom > /root/file; sha256sum /root/file > /root/sum")
    one.reboot()
    assert one.domid != first
    assert one.run("sha256sum -c /root/sum") == "/root/file: OK"


def test_what_a_command_in_a_guest_does_wrong_is_told(guest: Callable[..., Guest]) -> None:
    one = guest()
    assert one.ask("echo out; exit 3") == (3, "out")
    with pytest.raises(CommandError, match="status 1\nno"):
        one.run("echo no; false")
    job = one.start("sleep 1; echo done")
    assert job.wait(30) == "done"
    with pytest.raises(CommandError, match="did not end"):
        one.run("sleep 100", seconds=1)
