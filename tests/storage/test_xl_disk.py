"""Disks as xl's manual writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdrivers.errors import ConfigError
from pvdrivers.storage.uri import parse_disk
from pvdrivers.storage.xl_disk import XlDisk, parse_xl_disk


def facts(disk: XlDisk) -> tuple[str, str, str, bool]:
    return disk.spec.path, disk.vdev, disk.spec.mode, disk.spec.cdrom


@pytest.mark.parametrize("words", [
    ["/dev/vg/guest-volume,,hda"],
    ["/dev/vg/guest-volume,raw,hda,rw"],
    ["format=raw, vdev=hda, access=rw, target=/dev/vg/guest-volume"],
    ["raw:/dev/vg/guest-volume,hda,w"],
    ["phy:vg/guest-volume,hda,w"],
    ["tap:aio:/dev/vg/guest-volume,hda"],
    ["vg/guest-volume", "raw", "hda"],
    ["vdev=hda", "target=/dev/vg/guest-volume"],
    ["hda,vdev=hda,target=/dev/vg/guest-volume"],
])  # fmt: skip
def test_what_the_manual_says_is_the_same(words: list[str]) -> None:
    if words == ["hda,vdev=hda,target=/dev/vg/guest-volume"]:
        with pytest.raises(ConfigError, match="target is given twice"):
            parse_xl_disk(words)
        return
    assert facts(parse_xl_disk(words)) == ("/dev/vg/guest-volume", "hda", "w", False)


@pytest.mark.parametrize("text", [
    "/root/image.iso,,hdc,cdrom",
    "/root/image.iso,,hdc,,cdrom",
    "/root/image.iso,raw,hdc,devtype=cdrom",
    "format=raw, vdev=hdc, access=ro, devtype=cdrom, target=/root/image.iso",
    "raw:/root/image.iso,hdc:cdrom,ro",
])  # fmt: skip
def test_a_cdrom(text: str) -> None:
    disk = parse_xl_disk([text])
    assert facts(disk) == ("/root/image.iso", "hdc", "r", True)
    assert disk.devid == 5632


@pytest.mark.parametrize(("text", "wanted"), [
    ("/x,,xvda,no-discard", {"discard": False}),
    ("/x,,xvda,discard", {"discard": True}),
    ("/x,,xvda,removable", {"removable": True}),
    ("/x,,xvda,r,policy=copy,queues=2,ring_order=1,direct=no", {"policy": "copy", "queues": 2, "ring_order": 1,
                                                               "direct": "no", "mode": "r"}),
    ("/x,,xvda,w!", {"mode": "w!"}),
    ("memory:64M,,xvda", {"scheme": "memory", "size": 64 << 20}),
    ("null:1T,,xvda", {"scheme": "null", "size": 1 << 40}),
    ("file:///srv/a%2Cb.img,,xvda", {"path": "/srv/a,b.img"}),
    ("vdev=xvda,target=/srv/a,b=c.img", {"path": "/srv/a,b=c.img"}),
    ("/dev/disk/by-path/pci-0000:00:1f.2,,xvda", {"path": "/dev/disk/by-path/pci-0000:00:1f.2"}),
])  # fmt: skip
def test_options(text: str, wanted: dict[str, Any]) -> None:
    spec = parse_xl_disk([text]).spec
    assert {name: getattr(spec, name) for name in wanted} == wanted
    assert parse_disk(spec.text()).path == spec.path, "what stands in the store is read as the same"


def test_more_of_xls() -> None:
    disk = parse_xl_disk(["/x,,xvda,w,backend=storage,direct-io-safe,untrusted,specification=xen,backendtype=phy"])
    assert (disk.backend, disk.direct_io_safe, disk.trusted) == ("storage", True, False)
    assert parse_xl_disk(["/x,,51712"]).devid == 51712


def test_a_path_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_xl_disk(["./disk.img,,xvda"]).spec.path == str(tmp_path / "disk.img")


@pytest.mark.parametrize(("text", "complaint"), [
    ("", "vdev is missing"),
    ("/x", "vdev is missing: .* vdev=xvdb"),
    (",,xvda", "target is missing"),
    ("/x,qcow2,xvda", "format=qcow2: only raw .* qemu-img convert"),
    ("/x,,xvda,w,extra", "'extra' is one too many"),
    ("/x,,xvda,rx", "access=rx: must be one of r, ro, w, rw, w!"),
    ("/x,,vda", "vda"),
    ("/x,,xvda,script=block-nbd", "script: none is run"),
    ("/x,,xvda,backendtype=qdisk", "backendtype=qdisk"),
    ("/x,,xvda,specification=virtio", "specification=virtio: must be xen"),
    ("/x,,xvda,devtype=tape", "devtype=tape: must be disk or cdrom"),
    ("/x,,xvda,colour=red", "unknown parameter 'colour'; there are: access, .*vdev"),
    ("/x,,xvda,vdev=xvdb", "vdev is given twice"),
    ("/x,,xvda,queues=0", "option queues='0': must be a number from 1 to 64"),
    ("/x,,xvda,discard,no-discard", "discard is given twice"),
    ("/a=b,,xvda", "written target=..., last"),
    ("rbd:pool/image,,xvda", "unknown scheme rbd:"),
    ("qcow2:/x,,xvda", "qcow2 images are not served"),
    ("/x,,xvda,trusted=maybe", "on or off"),
])  # fmt: skip
def test_mistakes(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_xl_disk([text])


@given(st.lists(st.text("/abx.,=:r vdtgn-", max_size=30), max_size=3))
def test_any_words_are_a_disk_or_a_clear_error(words: list[str]) -> None:
    try:
        disk = parse_xl_disk(words)
    except ConfigError as e:
        assert str(e).startswith("disk ")
    else:
        assert disk.vdev and (disk.spec.path.startswith("/") or disk.spec.scheme != "file")
