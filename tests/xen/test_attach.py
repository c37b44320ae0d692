"""Disks of ours beside the kernel's own xen-blkback, in the same guest at once: block-attach, block-list, block-detach.

And what the other verbs tell of it on the real Xen: check, stats; and whose a qdisk is.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from pvdrivers import toolstack
from pvdrivers.cli import main
from pvdrivers.cli.stats import snapshot
from pvdrivers.xenstore import XenStoreClient, default_path

from .guests import Guest
from .serve import Serve
from .stores import Stores, checksum
from .system import CommandError, dump, read, sh, until


@pytest.fixture(scope="module")
def kernel_backend() -> Iterator[None]:
    """xen-blkback is loaded, as it is on most hosts: every disk that xl attaches is its."""
    sh("modprobe", "xen-blkback")
    yield
    sh("modprobe", "-r", "xen-blkback")


@pytest.fixture(scope="module")
def daemon(kernel_backend: None, module_serve: Callable[..., Serve]) -> Serve:
    """Started as an operator would, with no class named."""
    return module_serve()


@pytest.fixture(scope="module")
def kernels_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file behind the guest's first disk."""
    with Stores(tmp_path_factory.mktemp("kernel")) as made:
        image = made.file("kernels", 16, random=True)
        made.loop(image)
        yield image


@pytest.fixture(scope="module")
def one(daemon: Serve, kernels_disk: Path, module_guest: Callable[..., Guest]) -> Guest:
    """A guest whose first disk is the kernel's."""
    device = sh("losetup", "-j", kernels_disk).partition(":")[0]
    return module_guest(f"phy:{device},xvda,w")


def pv(*words: str | Path, check: bool = True) -> str:
    """What a verb of `pvdrivers` printed. Raises CommandError. In this process: a start takes seconds here."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        status = main([str(word) for word in words])
    if check and status != 0:
        raise CommandError(" ".join(map(str, words)), status, out.getvalue())
    return out.getvalue()


def fio(vdev: str) -> str:
    return (
        f"fio --minimal --name={vdev} --filename=/dev/{vdev} --rw=randwrite --bs=16k --size=2m --ioengine=io_uring"
        " --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1"
    )


def seen(one: Guest, vdev: str, *, there: bool = True) -> None:
    """Wait until the guest has the disk, or has it no more."""
    one.run(f"{'until' if there else 'while'} [ -b /dev/{vdev} ]; do usleep 100000; done", seconds=30)


def test_a_disk_of_ours_beside_one_of_the_kernels(
    one: Guest, daemon: Serve, stores: Stores, kernels_disk: Path
) -> None:
    assert "vbd is left to the kernel's xen-blkback" in daemon.log.read_text()
    image = stores.file("ours", 16, random=True)
    said = pv("block-attach", "--connect", one.name, f"vdev=xvdb,format=raw,indirect=32,target={image}")
    assert said == f"xvdb: attached to domain {one.domid}, Connected\n"
    assert one.run("sha256sum < /dev/xvda; sha256sum < /dev/xvdb").split()[::2] == [
        checksum(kernels_disk),
        checksum(image),
    ]
    jobs = [one.start(fio(vdev)) for vdev in ("xvda", "xvdb")]
    for job in jobs:
        job.wait(120)
    one.run("echo 3 > /proc/sys/vm/drop_caches")
    assert one.run("sha256sum < /dev/xvdb").split()[0] == checksum(image)

    rows = {words[0]: words for words in map(str.split, pv("block-list", one.name).splitlines())}
    top = f"/local/domain/0/backend/{{}}/{one.domid}"
    assert rows["Vdev"][:7] == ["Vdev", "BE", "handle", "state", "evt-ch", "ring-ref", "BE-path"]
    for devid, kind, name, where in ((51712, "vbd", "xvda", "/dev/loop"), (51728, "pvblk", "xvdb", image)):
        row = rows[str(devid)]
        assert row[1:4] == ["0", str(one.domid), "4"] and row[6] == f"{top.format(kind)}/{devid}", row
        assert row[7:11] == [name, "w", "Connected", "1"] and row[11].startswith(str(where)), row
    theirs = sh("xl", "block-list", one.name).splitlines()[1:]
    assert [line.split()[0] for line in theirs] == ["51712"], "xl knows of its own"

    [row] = json.loads(pv("stats", "--json"))
    assert (row["device"], row["state"], row["uri"]) == (f"pvblk-{one.domid}-51728", "Connected", str(image))
    queue = row["queues"][0]
    assert queue["requests"]["write"] >= 100 and queue["bytes_written"] >= 2 << 20 and queue["errors"] == 0
    text = pv("stats")
    assert f"pvblk-{one.domid}-51728  Connected  {image}  policy persistent, at most " in text
    assert re.search(r"queue 0: \d+ read, \d+ write", text) and "0 errors, 0 violations" in text

    assert pv("block-detach", one.name, "xvdb") == f"xvdb: detached from domain {one.domid}\n"
    seen(one, "xvdb", there=False)
    assert read(top.format("pvblk")) is None, dump(top.format("pvblk"))
    assert pv("stats") == "no device is there\n"
    assert one.run("sha256sum < /dev/xvda").split()[0] == checksum(kernels_disk)


def test_what_cannot_be_attached_is_said(one: Guest, daemon: Serve, stores: Stores) -> None:
    nowhere = stores.top / "nowhere.img"

    def refused(*words: str | Path) -> str:
        with pytest.raises(CommandError) as error:
            pv(*words)
        return error.value.output

    assert f"{nowhere}: there is no such file" in refused("block-attach", one.name, f"{nowhere},raw,xvdc,rw")
    assert "attached already" in refused("block-attach", one.name, "memory:1M,raw,xvda,rw")
    assert "there is none of that name; there are: " in refused("block-attach", "nobody", "memory:1M,raw,xvdc,rw")
    assert f"xl block-detach {one.domid} xvda" in refused("block-detach", one.name, "xvda")
    assert "device class vbd: the kernel's xen-blkback" in refused("serve", "--class", "vbd")
    assert read(f"/local/domain/{one.domid}/device/vbd/51744") is None, "nothing is left"
    assert daemon.log.read_text().count(f"{nowhere}: there is no such file") == 1
    assert daemon.alive()


def test_check_tells_what_this_xen_has(daemon: Serve) -> None:
    said = " ".join(pv("check").split())
    info = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in sh("xl", "info").splitlines()}
    frames = int(sh("xenhypfs", "cat", "/params/gnttab_max_maptrack_frames").split()[-1], 0)
    for text in (
        f"ok xen Xen {info['xen_major']}.{info['xen_minor']}{info['xen_extra']}, PV dom0",
        f"ok xenstore {default_path()}, domain 0",
        "ok xen gntdev /dev/xen/gntdev",
        "ok xen evtchn /dev/xen/evtchn",
        "ok xen gntalloc /dev/xen/gntalloc: pages of our own, for frontends only, at most "
        + Path("/sys/module/xen_gntalloc/parameters/limit").read_text().strip(),
        "ok xen vbd xen-blkback is loaded: disks that xl attaches are the kernel's",
        f"ok xen grants {frames * 256 * 3 // 4 // 2} pages of guests may be mapped (3/4 of gnttab_max_maptrack_frames="
        f"{frames} on Xen's command line, a page counts twice in a PV domain)",
        "missing service no unit pvdrivers.service",
        "pvdrivers can run here",
    ):
        assert text in said, f"{text!r} is not in {said!r}"
    disks = {policy: int(n) for n, policy in re.findall(r"(\d+) with policy=(\w+)", said)}
    assert disks["copy"] > disks["map"] > disks["persistent"] > 10, disks


def test_a_qdisk_is_served_where_no_qemu_is(
    one: Guest, guest: Callable[..., Guest], serve: Callable[..., Serve], stores: Stores, tmp_path: Path
) -> None:
    ours = serve("--class", "qdisk", run_dir=tmp_path / "run")
    image, other = stores.file("qdisk", 8, random=True), stores.file("qemus", 8, random=True)
    store = XenStoreClient.connect(default_path())
    try:
        backend = toolstack.attach_vbd(store, one.domid, "xvdq", f"aio:{image}", kind="qdisk", be={"type": "qdisk"})
        seen(one, "xvdq")
        assert one.run("sha256sum < /dev/xvdq").split()[0] == checksum(image)
        # xl starts a QEMU for this one: two backends would destroy it.
        theirs = guest(f"format=raw,vdev=xvda,access=rw,backendtype=qdisk,target={other}")
        assert theirs.run("sha256sum < /dev/xvda").split()[0] == checksum(other)
        name = f"/local/domain/0/backend/qdisk/{theirs.domid}/51712"
        assert f"{name}: " in ours.log.read_text() and "not served, as two backends" in ours.log.read_text()
        assert f"qdisk-{theirs.domid}-51712: " not in ours.log.read_text()
        theirs.destroy()
        assert toolstack.detach(store, backend, timeout=20)
        seen(one, "xvdq", there=False)
    finally:
        store.close()


def test_a_guest_that_does_not_answer_and_goes(
    one: Guest, daemon: Serve, stores: Stores, kernels_disk: Path
) -> None:
    """Last in this file: what is taken away by force stays in the guest, whose kernel waits for answers for ever."""
    images = {vdev: stores.file(vdev, 8) for vdev in ("xvdb", "xvdc")}
    for vdev, image in images.items():
        pv("block-attach", "--connect", one.name, f"{image},raw,{vdev},rw")
    one.run("mkfs.ext4 -q -F /dev/xvdb && mount /dev/xvdb /mnt && echo kept > /mnt/f && sync")
    one.xl("pause")
    with pytest.raises(CommandError) as refused:
        pv("block-detach", "--timeout", "2", one.name, "xvdb")
    assert "not let go within 2 s: backend Closing" in refused.value.output and "--force" in refused.value.output
    pv("block-detach", "--force", one.name, "xvdb")
    one.xl("unpause")
    domid = one.domid
    assert read(f"/local/domain/0/backend/pvblk/{domid}/51728/state") is None
    sh("e2fsck", "-fp", images["xvdb"], check=False)
    sh("e2fsck", "-fn", images["xvdb"])
    one.run("dd if=/dev/xvda of=/dev/null bs=4096 count=8 iflag=direct 2>&1")

    job = one.start(f"while {fio('xvdc')}; do true; done")
    until(lambda: snapshot(daemon.run_dir)[0]["queues"][0]["requests"]["write"] > 0, 60, "there is I/O")
    assert job.running()
    one.destroy()
    until(lambda: read(f"/local/domain/0/backend/pvblk/{domid}/51744/state") is None, 20, "its directory has gone")
    until(lambda: f"pvblk-{domid}-51744: removed" in daemon.log.read_text(), 10, "it is removed")
    until(lambda: sh("xl", "list").count("\n") == 2, 20, "no domain is left dying")
    assert daemon.alive()
