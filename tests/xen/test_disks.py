"""Ten disks of one guest, no two alike: rings of one to sixteen pages, segments, queues, policies, stores. Each is
verified by the guest, compared in dom0, given a filesystem and trimmed; one guest of each kernel covers the matrix.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pvdrivers.cli.stats import snapshot
from pvdrivers.toolstack import devid_of

from .guests import Guest, disk, kernels
from .serve import Serve
from .stores import Stores, checksum
from .system import CommandError, dump, listing, read, sh, until

MIB = 18
GUEST = "xen_blkfront.max_ring_page_order=4 xen_blkfront.max_indirect_segments=256"
"""What the guest would take; what each disk offers limits it."""


@dataclass(frozen=True)
class Case:
    """One disk: its options, where its data is, and what has to come of it."""

    vdev: str
    options: str
    order: int = 4
    segments: int = 256
    policy: str = "copy"
    loop: tuple[str, ...] | None = None
    """Words of losetup, if it is a block device; else it is a file."""
    sector: int = 512
    flushes: bool = True
    """Whether the guest is to flush: not where every write is durable."""
    queues: int = 1


CASES = [
    Case("xvda", "ring_order=0,indirect=32", 0, 32, "persistent"),
    Case("xvdb", "ring_order=1,policy=map,direct=no", 1, 256, "map"),
    Case("xvdc", "ring_order=2,indirect=0,policy=copy", 2, 11, "copy"),
    Case("xvdd", "ring_order=3,indirect=32", 3, 32, "persistent"),
    Case("xvde", "policy=copy,cache=writethrough", 4, 256, "copy", flushes=False),
    Case("xvdf", "indirect=0,direct=yes", 4, 11, "persistent", ()),
    # Pages could still be mapped after direct I/O: what was to be mapped is copied.
    Case("xvdg", "ring_order=0,policy=map,direct=yes", 0, 256, "copy", ()),
    Case("xvdh", "ring_order=2,indirect=32", 2, 32, "persistent", ("-b", "4096"), 4096),
    Case("xvdi", "ring_order=1,sector_size=4096,policy=map,direct=no,indirect=32", 1, 32, "map", None, 4096),
    Case("xvdj", "persistent=off,direct=no,grant_pages=600", 4, 256, "map", ()),
]
QUEUES = [
    Case("xvda", "ring_order=0,indirect=32", 0, 32, "persistent", queues=2),
    Case("xvdb", "ring_order=1,policy=copy,queues=8", 1, 256, "copy", (), queues=2),
    Case("xvdc", "queues=1,ring_order=0,policy=map,direct=no", 0, 256, "map"),
]
"""For a guest of two vCPUs."""


@pytest.fixture(scope="module", autouse=True)
def daemon(module_serve: Callable[..., Serve]) -> Serve:
    """One daemon for all tests of this file."""
    return module_serve()


def stats(daemon: Serve) -> dict[str, dict[str, Any]]:
    """What `pvdrivers stats --json` says, by device."""
    return {row["device"]: row for row in snapshot(daemon.run_dir)}


def target(case: Case, stores: Stores) -> tuple[Path, str]:
    """The file that a disk's data ends up in, and what xl is to write as its target."""
    image = stores.file(case.vdev, MIB)
    device = image if case.loop is None else stores.loop(image, *case.loop)
    return image, f"{device},{case.options}"


def wanted(cases: list[Case]) -> dict[str, dict[str, Any]]:
    """What is to come of the handshakes."""
    return {
        case.vdev: {"order": case.order, "queues": case.queues, "persistent": str(int(case.policy == "persistent")),
                    "segments": case.segments, "sector": case.sector, "hardware queues": case.queues}
        for case in cases
    }  # fmt: skip


def agreed(cases: list[Case], one: Guest) -> dict[str, dict[str, Any]]:
    """What both ends wrote of each disk, and what the guest's kernel made of it."""
    said = one.run(
        f"for d in {' '.join(case.vdev for case in cases)}; do cd /sys/block/$d;"
        " echo $(cat queue/max_segments queue/logical_block_size) $(ls mq | wc -l); done"
    )
    found = {}
    for case, line in zip(cases, said.splitlines()):
        devid = devid_of(case.vdev)
        front = f"/local/domain/{one.domid}/device/vbd/{devid}"
        segments, sector, hardware = map(int, line.split())
        assert read(f"{front}/feature-persistent") == "1", "Linux's always says so"
        found[case.vdev] = {
            "order": int(read(f"{front}/ring-page-order") or 0),
            "queues": int(read(f"{front}/multi-queue-num-queues") or 1),
            "persistent": read(f"/local/domain/0/backend/vbd/{one.domid}/{devid}/feature-persistent"),
            "segments": segments,
            "sector": sector,
            "hardware queues": hardware,
        }
    return found


def fio(*vdevs: str, jobs: str = "") -> str:
    """A command line: sizes from 4 KiB to 1 MiB, sixteen in flight, by io_uring, all read back."""
    words = [f"--name={vdev} --filename=/dev/{vdev} {jobs}" for vdev in vdevs]
    return (
        "fio --minimal --ioengine=io_uring --direct=1 --iodepth=16 --rw=write --bssplit=4k/60:64k/25:256k/10:1m/5"
        " --size=4m --fsync=32 --end_fsync=1 --verify=crc32c --verify_fatal=1 --group_reporting"
        f" {' '.join(words)} > /tmp/fio.out 2>&1 || (cat /tmp/fio.out; false)"
    )


def compared(one: Guest, images: dict[str, Path]) -> None:
    """Each disk, as the guest reads it, is what is in dom0's file."""
    command = f"for d in {' '.join(images)}; do sha256sum < /dev/$d; done"
    sums = [line.split()[0] for line in one.run(command, seconds=200).splitlines()]
    assert dict(zip(images, sums)) == {vdev: checksum(image) for vdev, image in images.items()}


def served(cases: list[Case], one: Guest, daemon: Serve) -> None:
    """What the daemon's counters say of them."""
    rows = stats(daemon)
    for case in cases:
        row = rows[f"vbd-{one.domid}-{devid_of(case.vdev)}"]
        about = f"{case}: {row}"
        assert (row["policy"], row["ring_order"], len(row["queues"])) == (case.policy, case.order, case.queues), about
        assert not row["troubles"] and not row["error"], about
        queues = row["queues"]
        assert all(q["requests"]["write"] > 0 for q in queues), about
        total = {key: sum(q[key] for q in queues) for key in queues[0] if isinstance(queues[0][key], int)}
        assert (total["errors"], total["violations"], total["map_failures"], total["fallbacks"]) == (0, 0, 0, 0), about
        assert (total["persistent_hits"] > 0) == (case.policy == "persistent"), about
        assert (total["grants_mapped"] > 0) == (case.policy != "copy"), about
        assert total["grants_copied"] > 0 or case.policy != "copy", about
        assert (sum(q["requests"]["flush"] for q in queues) > 0) == case.flushes, about


def allocated(image: Path) -> int:
    """KiB of a sparse file that are there (du)."""
    return image.stat().st_blocks // 2


@pytest.mark.parametrize("kernel", kernels())
def test_ten_disks_of_every_kind_at_once(
    guest: Callable[..., Guest], stores: Stores, kernel: str, daemon: Serve
) -> None:
    made = {case.vdev: target(case, stores) for case in CASES}
    images = {vdev: image for vdev, (image, _) in made.items()}
    one = guest(*(disk(text, vdev) for vdev, (_, text) in made.items()), kernel=kernel, memory=640, extra=GUEST)
    assert agreed(CASES, one) == wanted(CASES)
    one.run(fio(*images), seconds=250)
    compared(one, images)
    served(CASES, one, daemon)
    files_and_fstrim(one, images)
    assert one.ask("dmesg | grep -i -E 'i/o error|ext4.*error|blkfront.*(bogus|error)'")[1] == ""
    one.destroy()
    for image in images.values():
        sh("e2fsck", "-fn", image)
    assert daemon.alive()


def test_two_queues_of_two_processors(guest: Callable[..., Guest], stores: Stores, daemon: Serve) -> None:
    """With Debian's kernel: the emulated machine has had the newer one panic with two."""
    made = {case.vdev: target(case, stores) for case in QUEUES}
    images = {vdev: image for vdev, (image, _) in made.items()}
    one = guest(*(disk(text, vdev) for vdev, (_, text) in made.items()), vcpus=2, extra=GUEST)
    assert agreed(QUEUES, one) == wanted(QUEUES)
    one.run(fio(*images, jobs="--numjobs=2 --cpus_allowed=0-1 --cpus_allowed_policy=split --offset_increment=5m"),
            seconds=250)  # fmt: skip
    compared(one, images)
    served(QUEUES, one, daemon)
    assert daemon.alive()


def files_and_fstrim(one: Guest, images: dict[str, Path]) -> None:
    """A filesystem on each disk: what is written is there in dom0 after a sync, and gone from there after fstrim."""
    loop = f"set -e; for d in {' '.join(images)}; do"
    one.run(f"{loop} mkfs.ext4 -q -F /dev/$d; mkdir -p /m/$d; mount /dev/$d /m/$d; done", seconds=120)
    empty = {vdev: allocated(image) for vdev, image in images.items()}
    one.run(
        f"head -c 6000000 /dev/urandom > /tmp/data; {loop} cp /tmp/data /m/$d/keep;"
        " head -c 4000000 /tmp/data > /m/$d/go; done; sync; echo 3 > /proc/sys/vm/drop_caches;"
        " for d in /m/*; do cmp $d/keep /tmp/data; done",
        seconds=180,
    )
    full = {vdev: allocated(image) for vdev, image in images.items()}
    one.run(f"{loop} rm /m/$d/go; sync -f /m/$d/keep || sync; fstrim /m/$d; done; sync", seconds=120)
    trimmed = {vdev: allocated(image) for vdev, image in images.items()}
    for vdev in images:
        about = f"{vdev}: {empty[vdev]} KiB empty, {full[vdev]} with files, {trimmed[vdev]} trimmed"
        assert full[vdev] >= empty[vdev] + 9500, about
        assert trimmed[vdev] <= full[vdev] - 3500, about
    one.run(f"{loop} cmp /m/$d/keep /tmp/data; umount /m/$d; done; sync", seconds=120)


@pytest.fixture(scope="module")
def running(module_guest: Callable[..., Guest], tmp_path_factory: pytest.TempPathFactory, daemon: Serve) -> Any:
    """A guest with one disk, for what happens to others beside it."""
    with Stores(tmp_path_factory.mktemp("running")) as made:
        yield module_guest(disk(made.file("first", 16), "xvda"))


def gone(one: Guest, vdev: str) -> None:
    one.run(f"while [ -b /dev/{vdev} ]; do usleep 100000; done", seconds=30)


def there(one: Guest, vdev: str) -> None:
    one.run(f"until [ -b /dev/{vdev} ]; do usleep 100000; done", seconds=30)


def test_a_read_only_disk_is_read_and_never_written(running: Guest, stores: Stores) -> None:
    image = stores.file("ro", 8, random=True)
    before = checksum(image)
    running.xl("block-attach", disk(image, "xvdb", mode="ro"))
    there(running, "xvdb")
    assert running.run("blockdev --getro /dev/xvdb") == "1"
    assert running.run("sha256sum < /dev/xvdb").split()[0] == before
    for command in ("dd if=/dev/zero of=/dev/xvdb bs=4k count=1 conv=fsync", "blkdiscard /dev/xvdb",
                    "mkfs.ext4 -F /dev/xvdb"):  # fmt: skip
        status, output = running.ask(command)
        assert status != 0, (command, output)
    assert checksum(image) == before
    running.xl("block-detach", "xvdb")


@pytest.mark.parametrize("kind", ["file", "loop"])
def test_a_disk_grows_while_its_filesystem_is_in_use(
    running: Guest, stores: Stores, daemon: Serve, kind: str
) -> None:
    image = stores.file("grows", 8)
    device = stores.loop(image) if kind == "loop" else image
    running.xl("block-attach", disk(device, "xvdb"))
    there(running, "xvdb")
    running.run("mkfs.ext4 -q -F /dev/xvdb && mount /dev/xvdb /mnt")
    running.run("head -c 3000000 /dev/urandom > /mnt/f && md5sum /mnt/f > /mnt/sum")
    front = f"/local/domain/{running.domid}/device/vbd/{devid_of('xvdb')}"
    rings = [read(f"{front}/{key}") for key in ("ring-ref", "event-channel", "state")]
    writer = running.start(
        "while [ ! -e /tmp/enough ]; do dd if=/dev/zero of=/mnt/w bs=64k count=16 conv=fsync 2>&1 || exit 1; done"
    )
    with image.open("r+b") as f:
        f.truncate(24 << 20)
    if kind == "loop":
        sh("losetup", "-c", device)
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: running.run("cat /sys/block/xvdb/size") == str(24 << 11), 20, "the guest sees the new size")
    running.run("resize2fs /dev/xvdb && head -c 12000000 /dev/urandom > /mnt/g && sync", seconds=60)
    running.run("touch /tmp/enough")
    writer.wait(30)
    assert rings == [read(f"{front}/{key}") for key in ("ring-ref", "event-channel", "state")]
    running.run("cd /; md5sum -c /mnt/sum && umount /mnt && rm /tmp/enough")
    running.xl("block-detach", "xvdb")
    gone(running, "xvdb")
    sh("e2fsck", "-fn", image)


def test_disks_come_and_go_while_another_is_busy(running: Guest, stores: Stores) -> None:
    """And what is on each is right, whatever the letter that it had before."""
    busy = running.start(
        "while [ ! -e /tmp/enough ]; do fio --minimal --name=busy --filename=/dev/xvda --rw=randwrite --bs=16k"
        " --size=2m --ioengine=io_uring --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1 || exit 1; done"
    )
    images = [stores.file(f"hot{n}", 2, random=True) for n in range(3)]
    for two in (images[:2], images[1:]):
        for image, vdev in zip(two, ("xvdb", "xvdc")):
            running.xl("block-attach", disk(image, vdev))
        for image, vdev in zip(two, ("xvdb", "xvdc")):
            there(running, vdev)
            assert running.run(f"sha256sum < /dev/{vdev}").split()[0] == checksum(image)
            running.xl("block-detach", vdev)
            gone(running, vdev)
    assert busy.running()
    running.run("touch /tmp/enough")
    busy.wait(120)
    running.run("rm /tmp/enough")
    top = f"/local/domain/0/backend/vbd/{running.domid}"
    assert listing(top) == [str(devid_of("xvda"))], dump(top)


def test_what_cannot_be_served_is_refused_and_said_once(running: Guest, stores: Stores, daemon: Serve) -> None:
    """A path that is not there, and an image that another disk has: xl fails, and the daemon goes on."""
    taken = stores.file("taken", 4, random=True)
    running.xl("block-attach", disk(taken, "xvdb"))
    there(running, "xvdb")
    bad = {"xvdc": stores.top / "nowhere" / "disk", "xvdd": taken, "xvde": stores.top}
    with ThreadPoolExecutor(len(bad)) as pool:
        tried = {v: pool.submit(running.xl, "block-attach", disk(path, v), check=False) for v, path in bad.items()}
        errors = {}
        for vdev in bad:
            where = f"/local/domain/0/backend/vbd/{running.domid}/{devid_of(vdev)}/hotplug-error"
            errors[vdev] = until(lambda where=where: read(where), 20, f"{where} is written")
        for vdev, future in tried.items():
            assert "unable to add device" in future.result(), (vdev, future.result())
    assert errors["xvdc"].startswith(f"{bad['xvdc']}: there is no such file")
    assert "is held by this process, for another disk" in errors["xvdd"]
    assert errors["xvde"].startswith(f"{stores.top}: is a directory")
    log = daemon.log.read_text()
    assert [log.count(text) for text in errors.values()] == [1, 1, 1], log[-4000:]
    assert running.run("sha256sum < /dev/xvdb").split()[0] == checksum(taken)
    running.xl("block-detach", "xvdb")
    gone(running, "xvdb")
    assert daemon.alive()


def test_what_is_taken_away_by_force(running: Guest, stores: Stores, daemon: Serve) -> None:
    """Last in this file: a guest that did not answer keeps the disk, and its kernel waits for answers for ever."""
    image = stores.file("forced", 8)
    running.xl("block-attach", disk(image, "xvdb"))
    there(running, "xvdb")
    running.run("mkfs.ext4 -q -F /dev/xvdb && mount /dev/xvdb /mnt && echo kept > /mnt/f && sync")
    name = f"vbd-{running.domid}-{devid_of('xvdb')}"
    running.xl("pause")
    with pytest.raises(CommandError):
        running.xl("block-detach", "xvdb", seconds=60)
    assert name in stats(daemon)
    running.xl("block-detach", "xvdb", options=["--force"], seconds=60, check=False)
    until(lambda: name not in stats(daemon), 30, f"{name} is let go by the daemon")
    running.xl("unpause")
    sh("e2fsck", "-fp", image, check=False)
    sh("e2fsck", "-fn", image)
    assert running.run("dd if=/dev/xvda of=/dev/null bs=4096 count=8 iflag=direct 2>&1; echo well").endswith("well")
    assert daemon.alive()
