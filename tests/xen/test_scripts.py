"""Disks with a hotplug script, as guests have them whose configuration was written for the kernel's backend: xl's own
`block` for a device and for a file, and one that makes a device. And who serves what xl is told nothing more about.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pvdrivers.cli.stats import snapshot

from .guests import Guest, disk
from .load import verified
from .serve import Serve
from .stores import Stores, checksum
from .system import listing, read, sh, until

BLOCK = "/etc/xen/scripts/block"
MADE = Path("/etc/xen/scripts/block-made")
SCRIPT = """#!/bin/bash
. "$(dirname "$0")/block-common.sh"
file=$(xenstore_read "$XENBUS_PATH/params")
case $command in
    add)
        sleep 2  # longer than a guest takes to find its disk
        device=$(losetup -f --show "${file#made:}")
        xenstore_write "$XENBUS_PATH/node" "$device"
        write_dev "$device" ;;
    remove)
        losetup -d "$(xenstore_read "$XENBUS_PATH/node")" ;;
esac
"""
"""As a volume manager's: what stands in `params` says something to nobody but the script."""


@pytest.fixture(scope="module", autouse=True)
def daemon(module_serve: Callable[..., Serve]) -> Serve:
    """One daemon for all tests of this file."""
    return module_serve()


@pytest.fixture(scope="module")
def running(module_guest: Callable[..., Guest], daemon: Serve) -> Guest:
    """A guest to which disks come."""
    return module_guest()


def where(one: Guest, vdev: int) -> str:
    return f"/local/domain/0/backend/vbd/{one.domid}/{vdev}"


def loops(image: Path) -> list[str]:
    """Loop devices on a file."""
    return [line.partition(":")[0] for line in sh("losetup", "-j", image).splitlines()]


def numbers(device: str) -> str:
    """As scripts write them."""
    st = os.stat(device)
    return f"{os.major(st.st_rdev):x}:{os.minor(st.st_rdev):x}"


def comes_and_goes(one: Guest, line: str, image: Path, keys: Callable[[str], None]) -> None:
    """A disk with this line is what is in the image, both ways; `keys` looks at its directory; it goes in order."""
    try:
        one.xl("block-attach", line)
        one.run("until [ -b /dev/xvdb ]; do usleep 100000; done", seconds=30)
        keys(where(one, 51728))
        assert one.run("sha256sum < /dev/xvdb").split()[0] == checksum(image)
        one.run("head -c 100000 /dev/urandom > /tmp/x; dd if=/tmp/x of=/dev/xvdb bs=64k conv=fsync 2>&1")
        assert one.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum < /dev/xvdb").split()[0] == checksum(image)
    finally:
        said = one.xl("block-detach", "xvdb", check=False)
    assert "unable" not in said and "failed" not in said, said
    one.run("while [ -b /dev/xvdb ]; do usleep 100000; done", seconds=30)
    assert read(f"{where(one, 51728)}/state") is None


def test_a_guest_as_it_was_with_the_kernels_backend(
    guest: Callable[..., Guest], stores: Stores, daemon: Serve
) -> None:
    """Its lines say nothing of us: "phy:DEVICE,xvda,w", for which xl runs its own script."""
    images = {"xvda": stores.file("rw", 16, random=True), "xvdb": stores.file("ro", 8, random=True)}
    devices = {vdev: stores.loop(image) for vdev, image in images.items()}
    one = guest(f"phy:{devices['xvda']},xvda,w")
    one.xl("block-attach", f"phy:{devices['xvdb']},xvdb,r")
    one.run("until [ -b /dev/xvdb ]; do usleep 100000; done", seconds=30)
    for vdev, number in (("xvda", 51712), ("xvdb", 51728)):
        path = where(one, number)
        found = {key: read(f"{path}/{key}") for key in ("script", "type", "physical-device", "hotplug-status")}
        assert found == {"script": BLOCK, "type": "phy", "physical-device": numbers(devices[vdev]),
                         "hotplug-status": "connected"}  # fmt: skip
        assert one.run(f"sha256sum < /dev/{vdev}").split()[0] == checksum(images[vdev])
    assert one.run("blockdev --getro /dev/xvda; blockdev --getro /dev/xvdb").split() == ["0", "1"]
    with verified(one, "xvda") as load:
        daemon.kill()
        daemon.start()
        load.wait_progress()
    one.reboot()
    assert one.run("sha256sum < /dev/xvda").split()[0] == checksum(images["xvda"])
    # The same device for another guest: the first is not harmed by what is refused.
    with pytest.raises(Exception, match="unable to add disk"):
        guest(f"phy:{devices['xvda']},xvda,w")
    assert one.run("dd if=/dev/xvda of=/dev/null bs=64k iflag=direct 2>&1; echo well").endswith("well")


def test_a_block_device_that_comes_and_goes(running: Guest, stores: Stores) -> None:
    image = stores.file("device", 8, random=True)
    device = stores.loop(image)

    def keys(path: str) -> None:
        assert (read(f"{path}/script"), read(f"{path}/physical-device")) == (BLOCK, numbers(device))

    comes_and_goes(running, f"phy:{device},xvdb,w", image, keys)
    assert loops(image) == [device], "what was there before stays"


def test_a_file_for_which_the_script_makes_a_loop_device(running: Guest, stores: Stores) -> None:
    """Ours serves the file itself; the loop device is there for nothing, and goes with the disk."""
    image = stores.file("file", 8, random=True)

    def keys(path: str) -> None:
        [device] = loops(image)
        assert read(f"{path}/physical-device-path") == read(f"{path}/node") == device
        [row] = [row for row in snapshot(Path("/run/pvdrivers")) if row["device"].endswith("-51728")]
        assert row["uri"] == str(image), row

    comes_and_goes(running, disk(image, "xvdb", script="block"), image, keys)
    assert loops(image) == []


def test_a_device_that_a_script_makes(running: Guest, stores: Stores, daemon: Serve) -> None:
    """It is waited for, taken over by a daemon that is started anew, and let go before the script takes it away."""
    image = stores.file("made", 16, random=True)
    MADE.write_text(SCRIPT)
    MADE.chmod(0o755)
    before = len(daemon.log.read_text())
    try:
        def keys(path: str) -> None:
            [device] = loops(image)
            assert read(f"{path}/params") == f"made:{image}"
            assert read(f"{path}/physical-device-path") == device
            assert "it waits for the hotplug script block-made" in daemon.log.read_text()[before:]
            with verified(running, "xvdb") as load:
                daemon.kill()
                daemon.start()
                load.wait_progress()

        comes_and_goes(running, disk(f"made:{image}", "xvdb", script="block-made"), image, keys)
        until(lambda: loops(image) == [], 10, "the script has taken its device away")
    finally:
        MADE.unlink()


def test_who_serves_a_file_of_which_nothing_more_is_said(
    guest: Callable[..., Guest], stores: Stores, daemon: Serve
) -> None:
    """libxl takes `vbd` and its script for a raw file, which are ours; what is QEMU's is left to it."""
    image = stores.file("plain", 8, random=True)
    theirs = stores.file("theirs", 8, random=True)
    one = guest(f"{image},raw,xvda,w", f"format=raw,vdev=xvdb,access=rw,backendtype=qdisk,target={theirs}")
    assert listing(f"/local/domain/0/backend/vbd/{one.domid}") == ["51712"]
    assert listing(f"/local/domain/0/backend/qdisk/{one.domid}") == ["51728"]
    assert read(f"{where(one, 51712)}/script") == BLOCK and len(loops(image)) == 1
    assert one.run("sha256sum < /dev/xvda").split()[0] == checksum(image)
    assert one.run("sha256sum < /dev/xvdb").split()[0] == checksum(theirs)
    assert f"-{one.domid}-51728: " not in daemon.log.read_text()
