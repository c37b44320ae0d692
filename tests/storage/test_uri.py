"""Reading what the operator wrote about a disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdrivers.errors import ConfigError
from pvdrivers.storage.uri import OPTIONS, DiskSpec, parse_disk, parse_size, parse_xl, size_text

VALUES = {
    "mode": st.sampled_from(["r", "w", "w!"]),
    "sector_size": st.sampled_from(["4096", "auto"]),
    "direct": st.sampled_from(["yes", "no", "auto"]),
    "cache": st.sampled_from(["writeback", "writethrough", "unsafe"]),
    "policy": st.sampled_from(["map", "persistent", "copy"]),
    "queues": st.integers(1, 64).map(str),
    "ring_order": st.integers(0, 4).map(str),
    "indirect": st.integers(0, 4096).map(str),
    "vdev": st.sampled_from(["xvda", "hda", "51712"]),
} | {
    name: st.sampled_from(["on", "off", "yes", "no"])
    for name in ("removable", "discard", "secure_discard", "compat_4k")
}
PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).map(lambda s: "/" + s)


@given(PATHS, st.dictionaries(st.sampled_from(sorted(VALUES)), st.none(), max_size=6), st.data())
def test_the_canonical_text_is_read_as_the_same_disk(path: str, names: dict[str, None], data: st.DataObject) -> None:
    options = [f"{name}={data.draw(VALUES[name])}" for name in names]
    first = parse_disk(",".join([DiskSpec("", path=path).text(), *options]))
    again = parse_disk(first.text())
    assert {n: getattr(again, n) for n in vars(again) if n != "uri"} == {
        n: getattr(first, n) for n in vars(first) if n != "uri"
    }
    assert again.text() == first.text()


@given(st.text(max_size=40))
def test_any_text_is_a_disk_or_a_clear_error(text: str) -> None:
    try:
        assert parse_disk(text).scheme in ("file", "memory", "null")
    except ConfigError as e:
        assert repr(text) in str(e)


@given(st.integers(0, 1 << 61))
def test_sizes_are_written_exactly(size: int) -> None:
    assert parse_size(size_text(size)) == size


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("512", 512), ("1k", 1024), ("64M", 64 << 20), ("2GiB", 2 << 30), ("1T", 1 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1.5G", "1Q", "M", "1iB", "99999999999999999999", "4194304T", "\u0661"]
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="size|largest"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "scheme", "path", "size"),
    [
        ("/srv/a.img", "file", "/srv/a.img", 0),
        ("/srv/../srv/a:b.img", "file", "/srv/a:b.img", 0),
        ("file:///srv/a%2Cb.img", "file", "/srv/a,b.img", 0),
        ("aio:/srv/a.img", "file", "/srv/a.img", 0),
        ("tap:aio:/srv/a.img", "file", "/srv/a.img", 0),
        ("raw:/srv/a.img", "file", "/srv/a.img", 0),
        ("phy:/dev/sdb", "file", "/dev/sdb", 0),
        ("phy:vg/guest", "file", "/dev/vg/guest", 0),
        ("memory:64M", "memory", "", 64 << 20),
        ("memory:", "memory", "", 64 << 20),
        ("null:1T", "null", "", 1 << 40),
    ],
)
def test_uris(text: str, scheme: str, path: str, size: int) -> None:
    spec = parse_disk(text)
    assert (spec.scheme, spec.path, spec.size) == (scheme, path, size)


def test_a_relative_path_is_made_absolute_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that opens it lives in another directory."""
    monkeypatch.chdir(tmp_path)
    assert parse_disk("a.img,mode=r").path == str(tmp_path / "a.img")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nbd://host", "unknown scheme nbd:; there are"),
        ("file://host/x", "three slashes"),
        ("", "no path or URI"),
        ("/x,foo=1", "unknown option 'foo'; there are: mode"),
        ("/x,y", "'y' is not of the form option=value"),
        ("/x,mode=rw", "option mode='rw': must be r, w or w!"),
        ("/x,sector_size=513", "option sector_size='513': must be 512, 4096 or auto"),
        ("/x,queues=0", "option queues='0': must be a number from 1 to 64"),
        ("/x,queues=9999999999", "must be a number from 1 to 64"),
        ("/x,removable=perhaps", "option removable='perhaps': must be on or off"),
        ("/x,mode=r,mode=w", "option mode is given twice"),
        ("/x,cdrom=on,mode=w", "a CD-ROM is read only"),
        ("/x,policy=copy,persistent=on", "contradict each other"),
        ("/x,compat_4k=on,sector_size=512", "means nothing"),
        ("memory:1000", "must be a multiple of the sector size, 512"),
        ("memory:0", "not zero"),
        ("memory:513K,sector_size=4096", "must be a multiple of the sector size, 4096"),
        ("null:lots", "'lots' is not a size"),
    ],
)
def test_each_mistake_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_disk(text)
    assert said in str(e.value) and repr(text) in str(e.value)


def test_every_option_is_explained() -> None:
    assert all(option.help and option.allowed for option in OPTIONS.values())


def test_persistent_follows_the_policy() -> None:
    assert parse_disk("/x").persistent
    assert not parse_disk("/x,policy=map").persistent
    assert parse_disk("/x,persistent=off").policy == "map"


def test_what_xl_writes() -> None:
    assert parse_xl("/srv/a.img", "w").mode == "w"
    assert parse_xl("aio:/srv/a.img", "r").readonly
    assert parse_xl("/srv/a.img", "w!").shared
    cd = parse_xl("/srv/a.iso", "w", "cdrom")
    assert cd.readonly and cd.cdrom
    assert (
        parse_xl("/srv/a.img,mode=w!,queues=2", "r", options="direct=no").text()
        == "/srv/a.img,mode=r,direct=no,queues=2"
    )
    for bad in ({"mode": "x"}, {"device_type": "tape"}, {"params": ""}, {"params": "qcow2:/x"}):
        with pytest.raises(ConfigError):
            parse_xl(**{"params": "/x", **bad})
