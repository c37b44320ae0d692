"""``pvdrivers check`` on a host that runs on Xen: files that say what dom0 would say, and a real xenstore."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvdrivers.cli import check_xen
from pvdrivers.cli.finding import Finding
from pvdrivers.xen import limits
from tests.xenstore.conftest import Served


class Tree:
    """The files of a Debian dom0, below a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Served(root / "store")
        with self.store.client() as client:
            client.write("/local/domain/0/domid", 0)
            client.write("/domid", 0)  # relative paths are dom0's own
        for path, text in {
            "sys/hypervisor/type": "xen\n", "sys/hypervisor/guest_type": "PV\n", "sys/hypervisor/version/major": "4\n",
            "sys/hypervisor/version/minor": "17\n", "sys/hypervisor/version/extra": ".7\n",
            "proc/xen/capabilities": "control_d\n", "dev/xen/gntdev": "", "dev/xen/evtchn": "",
        }.items():  # fmt: skip
            self.write(path, text)

    def write(self, path: str, text: str = "") -> None:
        where = self.root / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text)

    def found(self) -> dict[str, Finding]:
        return {f.name: f for f in check_xen.findings(self.root, str(self.root / "store"))}


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    made = Tree(tmp_path)
    yield made
    made.store.close()


def test_no_xen(tmp_path: Path) -> None:
    (found,) = check_xen.findings(tmp_path)
    assert (found.ok, found.essential, found.found) == (False, False, "not running on Xen")


def test_a_pv_dom0(tree: Tree) -> None:
    found = tree.found()
    assert found["xen"].found == "Xen 4.17.7, PV dom0"
    assert found["xen gntdev"].ok and found["xen evtchn"].ok
    assert not found["xen gntalloc"].ok and not found["xen gntalloc"].essential
    assert found["xenstore"].ok and found["xenstore"].found.endswith("domain 0")
    assert "xenstore quota" not in found


def test_what_is_essential(tree: Tree) -> None:
    (tree.root / "dev/xen/gntdev").unlink()
    tree.store.close()
    found = tree.found()
    assert [f.name for f in found.values() if f.essential and not f.ok] == ["xenstore", "xen gntdev"]
    assert found["xen gntdev"].advice == "modprobe xen-gntdev" and "start it" in found["xenstore"].advice


def test_a_store_that_does_not_know_us(tree: Tree) -> None:
    with tree.store.client() as client:
        client.rm("/local/domain/0/domid")
        client.rm("/domid")
    found = tree.found()
    assert found["xenstore"].essential and not found["xenstore"].ok and "xen-init-dom0" in found["xenstore"].advice


def test_a_driver_domain(tree: Tree) -> None:
    tree.write("proc/xen/capabilities", "\n")
    tree.write("sys/hypervisor/guest_type", "PVH\n")
    with tree.store.client() as client:
        for path in ("/local/domain/0/domid", "/domid"):
            client.write(path, 7)
    found = tree.found()
    assert found["xen"].found == "Xen 4.17.7, PVH or HVM domain 7: guests name it as backend= (a driver domain)"
    assert "about 28 disks" in found["xenstore quota"].found and "-E" in found["xenstore quota"].found


@pytest.mark.parametrize(("files", "ok", "words"), [
    ({}, False, "udev loads it"),
    ({"etc/modprobe.d/x.conf": "# blacklist xen_blkback\n"}, False, "udev loads it"),
    ({"etc/modprobe.d/x.conf": "blacklist foo\nblacklist xen-blkback\n"}, True, "etc/modprobe.d/x.conf keeps"),
    ({"lib/modprobe.d/y.conf": " install xen_blkback /bin/true"}, True, "lib/modprobe.d/y.conf keeps"),
    ({"sys/bus/xen-backend/drivers/vbd/x": "", "etc/modprobe.d/x.conf": "blacklist xen_blkback"}, True,
     "xen-blkback is loaded"),
])  # fmt: skip
def test_who_serves_what_xl_attaches(tree: Tree, files: dict[str, str], ok: bool, words: str) -> None:
    for path, text in files.items():
        tree.write(path, text)
    found = tree.found()["xen vbd"]
    assert found.ok is ok and words in found.found
    assert found.ok or "modprobe-pvdrivers.conf" in found.advice


def test_our_own_example_keeps_it_out(tree: Tree) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "dom0" / "modprobe-pvdrivers.conf"
    tree.write("etc/modprobe.d/pvdrivers.conf", example.read_text())
    assert tree.found()["xen vbd"].ok


def test_how_many_disks(tree: Tree) -> None:
    """A disk that keeps its pages takes twice as many as one that only maps them; one that copies takes its ring."""
    pages = limits.mappable_pages(pv=True)
    text = tree.found()["xen grants"].found
    assert text.startswith(f"{pages} pages of guests may be mapped") and "counts twice" in text
    assert f"{pages // 2113} with policy=persistent" in text and f"{pages // 1} with policy=copy" in text
    tree.write("sys/hypervisor/guest_type", "PVH\n")
    more = tree.found()["xen grants"].found
    assert more.startswith(f"{limits.mappable_pages(pv=False)} pages") and "counts twice" not in more


def test_how_many_mappings(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "xen mappings" not in tree.found()
    tree.write("proc/sys/vm/max_map_count", "65530\n")
    found = tree.found()["xen mappings"]
    assert not found.ok and not found.essential and "vm.max_map_count=65530" in found.found
    assert found.found.startswith("31741 pages in one process") and str(limits.mappable_pages(pv=True)) in found.found
    example = Path(__file__).resolve().parents[2] / "examples" / "dom0" / "sysctl-pvdrivers.conf"
    assert example.name in found.advice
    tree.write("proc/sys/vm/max_map_count", example.read_text().rpartition("vm.max_map_count =")[2])
    assert tree.found()["xen mappings"].ok
    monkeypatch.setattr(limits, "maptrack_frames", lambda: 4096)  # as the example says
    tree.write("sys/hypervisor/guest_type", "PVH\n")
    assert tree.found()["xen mappings"].ok


def test_gntallocs_limit(tree: Tree) -> None:
    tree.write("dev/xen/gntalloc")
    tree.write("sys/module/xen_gntalloc/parameters/limit", "1024\n")
    assert "at most 1024" in tree.found()["xen gntalloc"].found


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use any device")
def test_a_device_of_others(tree: Tree) -> None:
    (tree.root / "dev/xen/gntdev").chmod(0)
    found = tree.found()["xen gntdev"]
    assert not found.ok and "not ours to use" in found.found


def test_the_service(tree: Tree) -> None:
    assert not tree.found()["service"].ok
    tree.write("etc/systemd/system/pvdrivers.service")
    found = tree.found()["service"]
    assert found.ok and "not enabled: systemctl enable --now pvdrivers" in found.found
    wants = tree.root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    (wants / "pvdrivers.service").symlink_to("../pvdrivers.service")
    assert tree.found()["service"].found.endswith(", enabled")
