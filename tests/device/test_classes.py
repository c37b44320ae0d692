"""The table of device classes."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from pvdrivers import classes
from pvdrivers.errors import ConfigError
from tests.device.bed import Disk
from tests.device.yard import Yard


def test_a_class_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="'vxx': there are .*vbd"):
        classes.load("vxx")


def test_others_may_add_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("a_class_of_others")
    compiled: list[int] = []
    vars(module).update(Disk=type("Disk", (Disk,), {"__module__": module.__name__}), warm=lambda: compiled.append(1))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    points = [
        metadata.EntryPoint("vnew", "a_class_of_others:Disk", classes.GROUP),
        metadata.EntryPoint("vbad", "a_class_of_others:warm", classes.GROUP),
        metadata.EntryPoint("vgone", "no_such_module:Disk", classes.GROUP),
        metadata.EntryPoint("vbd", "a_class_of_others:Disk", classes.GROUP),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == classes.GROUP else [])
    assert issubclass(classes.load("vnew"), Disk)
    with pytest.raises(ConfigError, match="is not a pvdrivers.device.Device"):
        classes.load("vbad")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        classes.load("vgone")
    assert classes.known()["vbd"] == classes.DEVICE_CLASSES["vbd"], "ours cannot be replaced"


def test_what_has_to_be_asked_for() -> None:
    assert {"vbd", "pvblk"} <= set(classes.load_all()) and "qdisk" not in classes.load_all()
    assert set(classes.load_all(["qdisk"])) == {"qdisk"}


def test_the_kernel_is_left_alone_with_what_it_serves(tmp_path: Path) -> None:
    assert classes.beside_kernel(None, tmp_path) == (sorted(classes.load_all()), [])
    assert classes.beside_kernel(["vbd", "qdisk"], tmp_path) == (["vbd", "qdisk"], [])
    (tmp_path / "sys/bus/xen-backend/drivers/vbd").mkdir(parents=True)
    served, notes = classes.beside_kernel(None, tmp_path)
    assert "vbd" not in served and "pvblk" in served
    assert len(notes) == 1 and "xen-blkback" in notes[0] and "block-attach" in notes[0]
    with pytest.raises(ConfigError, match=r"device class vbd: the kernel's xen-blkback .*rmmod xen-blkback"):
        classes.beside_kernel(["pvblk", "vbd"], tmp_path)
    assert classes.beside_kernel(["pvblk"], tmp_path) == (["pvblk"], [])


def test_the_kernel_is_left_alone_with_what_it_will_serve(tmp_path: Path) -> None:
    """Where udev runs and nothing keeps xen-blkback out, it is there as soon as a guest gets a disk, and takes it."""
    modules = tmp_path / "lib/modules" / os.uname().release
    modules.mkdir(parents=True)
    (modules / "modules.alias").write_text("alias xen:vbd xen_blkfront\nalias xen-backend:vbd xen_blkback\n")
    assert "vbd" in classes.beside_kernel(None, tmp_path)[0], "nobody would load it"
    (tmp_path / "run/udev").mkdir(parents=True)
    (tmp_path / "run/udev/control").touch()
    served, (note,) = classes.beside_kernel(None, tmp_path)
    assert "vbd" not in served and "udev loads" in note and "modprobe-pvdrivers.conf" in note
    with pytest.raises(ConfigError, match="xen-blkback, which udev loads"):
        classes.beside_kernel(["vbd"], tmp_path)
    (tmp_path / "etc/modprobe.d").mkdir(parents=True)
    example = Path(__file__).parents[2] / "examples/dom0/modprobe-pvdrivers.conf"
    (tmp_path / "etc/modprobe.d/pvdrivers.conf").write_text(example.read_text())
    assert classes.beside_kernel(["vbd"], tmp_path) == (["vbd"], [])


def test_a_qdisk_that_is_a_qemus(yard: Yard) -> None:
    """Left to it where one runs for the domain, and where xl has made the disk, which starts one later."""
    store = yard.dom0
    assert classes.in_qemu(store, 0, "qdisk", 5, 51712) == "", "somebody else's toolstack"
    store.write("/local/domain/0/device-model/5/state", "running")
    assert "domain 5 has a QEMU" in classes.in_qemu(store, 0, "qdisk", 5, 51712)
    assert classes.in_qemu(store, 0, "pvblk", 5, 51712) == ""
    assert classes.in_qemu(store, 3, "qdisk", 5, 51712) == "", "it runs in another domain"
    store.write("/libxl/6/device/vbd/51712/backend", "/local/domain/0/backend/qdisk/6/51712")
    assert "xl has made it" in classes.in_qemu(store, 0, "qdisk", 6, 51712)
    assert classes.in_qemu(store, 0, "qdisk", 6, 51728) == ""
    driver_domain = yard.served.guest(9)
    yard.stack.callback(driver_domain.close)
    assert classes.in_qemu(driver_domain, 9, "qdisk", 6, 51712) == "", "it may not look"
