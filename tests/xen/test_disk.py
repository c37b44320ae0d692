"""The thin true path: xl makes a guest with a disk of ours; it finds on it what it wrote, also after a reboot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .guests import Guest, disk, kernels
from .serve import Serve
from .stores import Stores, checksum
from .system import dump, read, sh

EXAMPLE = Path(__file__).parents[2] / "examples/dom0/guest.cfg"
INIT_WAIT = 10.0
"""Seconds that libxl waits for a backend to say that it is there."""


@pytest.fixture(scope="module", autouse=True)
def daemon(module_serve: Callable[..., Serve]) -> Serve:
    """One daemon for all tests of this file."""
    return module_serve()


@pytest.mark.xen_quick
@pytest.mark.parametrize("kernel", kernels())
def test_a_filesystem_on_our_disk_outlives_a_reboot(
    guest: Callable[..., Guest], stores: Stores, kernel: str, daemon: Serve
) -> None:
    image = stores.file("disk", 64, random=True)
    one = guest(disk(image), kernel=kernel)
    assert one.run("sha256sum < /dev/xvda").split()[0] == checksum(image)
    one.run("mkfs.ext4 -q -F /dev/xvda && mount /dev/xvda /mnt")
    one.run("cd /mnt; for n in 1 2 3 4; do head -c 3000000 /dev/urandom > $n; done; sha256sum 1 2 3 4 > sums; sync")
    one.run("rm /mnt/4; sync; fstrim -v /mnt")
    one.reboot()
    one.run("mount /dev/xvda /mnt && cd /mnt && sed -i /4$/d sums && sha256sum -c sums")
    one.run("cd /; umount /mnt; sync")
    one.destroy()
    sh("e2fsck", "-fn", image)
    assert daemon.alive()


def test_a_guest_boots_from_our_root_disk_and_again(guest: Callable[..., Guest], stores: Stores) -> None:
    image = stores.copy(Path("/bed/guest-root.ext4"), "root")
    one = guest(disk(image), root="/dev/xvda")
    one.run("head -c 3000000 /dev/urandom > /root/file; sha256sum /root/file > /root/sum")
    for _ in range(2):
        one.reboot()
        assert one.run("mount | grep ' / '").startswith("/dev/xvda on / type ext4 (rw")
        assert one.run("sha256sum -c /root/sum") == "/root/file: OK"
    assert one.ask("dmesg | grep -i -E 'i/o error|ext4.*error|xvda.*timeout'")[1] == ""


def test_the_example_works_as_it_is(guest: Callable[..., Guest], stores: Stores) -> None:
    """What docs/dom0.md has an operator paste, on the files that it names."""
    where = Path("/srv/guests")
    where.mkdir(parents=True)
    try:
        for there, name in (("vmlinux", "vmlinuz"), ("initrd", "initrd.img")):
            (where / name).symlink_to(f"/bed/guests/debian/{there}")
        (where / "web.img").symlink_to(stores.copy(Path("/bed/guest-root.ext4"), "web"))
        one = guest(whole=EXAMPLE)
        assert one.name == "web" and one.run("nproc") == "2"
        assert one.run("mount | grep ' / '").startswith("/dev/xvda on / type ext4 (rw")
        one.run("echo kept > /root/file")
        one.reboot()
        assert one.run("cat /root/file") == "kept"
    finally:
        shutil.rmtree(where)


def test_what_xl_needs_to_take_a_disk_away_is_there(guest: Callable[..., Guest], stores: Stores) -> None:
    image = stores.file("disk", 8, random=True)
    one = guest()
    one.xl("block-attach", disk(image, "xvdb"))
    one.run("until [ -b /dev/xvdb ]; do usleep 100000; done", seconds=20)
    assert one.run("sha256sum < /dev/xvdb").split()[0] == checksum(image)
    where = f"/local/domain/0/backend/vbd/{one.domid}"
    assert read(f"{where}/51728/state") == "4", dump(where)
    one.xl("block-detach", "xvdb", seconds=INIT_WAIT)
    one.run("while [ -b /dev/xvdb ]; do usleep 100000; done", seconds=20)
    assert read(f"{where}/51728/state") is None, dump(where)


def test_what_xl_writes_of_a_disk_is_heeded(guest: Callable[..., Guest], stores: Stores) -> None:
    """discard-enable, device-type, direct-io-safe, mode: each as its word in xl's line has it."""
    images = {vdev: stores.file(vdev, 8, random=True) for vdev in ("xvda", "xvdb", "xvdc", "xvdd")}
    one = guest(
        disk(images["xvda"]),
        disk(images["xvdb"], "xvdb", "no-discard"),
        disk(images["xvdc"], "xvdc", mode="ro", devtype="cdrom"),
        disk(images["xvdd"], "xvdd", "direct-io-safe"),
    )
    back = f"/local/domain/0/backend/vbd/{one.domid}"
    numbers = dict(zip(images, (51712, 51728, 51744, 51760)))
    keys = ("discard-enable", "device-type", "direct-io-safe", "mode")
    said = {vdev: [read(f"{back}/{number}/{key}") for key in keys] for vdev, number in numbers.items()}
    assert said["xvda"] == ["1", "disk", None, "w"] and said["xvdb"][0] == "0", said
    assert said["xvdc"][1] == "cdrom" and said["xvdc"][3] == "r" and said["xvdd"][2] == "1", said
    for vdev, image in images.items():
        assert one.run(f"sha256sum < /dev/{vdev}").split()[0] == checksum(image)
    assert read(f"{back}/{numbers['xvda']}/feature-discard") == "1"
    assert read(f"{back}/{numbers['xvdb']}/feature-discard") in (None, "0")
    assert one.run("cat /sys/block/xvdb/queue/discard_max_bytes") == "0"
    assert one.run("cat /sys/block/xvda/queue/discard_max_bytes") != "0"
    assert int(read(f"{back}/{numbers['xvdc']}/info") or "0") & 5 == 5  # VDISK_CDROM, VDISK_READONLY
    assert one.run("cat /sys/block/xvdc/ro") == "1"
    before = images["xvda"].stat().st_blocks
    one.run("blkdiscard /dev/xvda", 60)
    assert images["xvda"].stat().st_blocks < before // 2
