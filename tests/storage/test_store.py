"""Opening stores: what they can do, and each refusal."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pvdrivers.errors import ConfigError, DeviceBusyError, StoreError
from pvdrivers.storage import file_store
from pvdrivers.storage.constants import PUNCH_HOLE
from pvdrivers.storage.store import STORE_FILE, STORE_MEMORY, STORE_NULL, Store, open_store, place_of
from pvdrivers.storage.uri import parse_disk

from .host import loop_device, run, tmpfs


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """open_store with a run directory; what it opens is closed at the end."""
    (tmp_path / "run").mkdir()
    with contextlib.ExitStack() as stack:

        def call(text: object, identity: str = "1/51712", **options: Any) -> Store:
            spec = parse_disk(str(text))
            return stack.enter_context(open_store(spec, run_dir=tmp_path / "run", identity=identity, **options))

        yield call


def test_null(opened: Any) -> None:
    s = opened("null:1T")
    assert (s.kind, s.fd, s.sectors, s.readonly) == (STORE_NULL, -1, 1 << 31, False)
    assert s.can_discard and s.can_flush and not s.flush_is_needed
    assert "1T" in s.describe()


def test_a_file(opened: Any, image: Path) -> None:
    s = opened(image)
    assert (s.kind, s.size, s.sectors, s.sector_size) == (STORE_FILE, 1 << 20, 2048, 512)
    assert s.can_flush and s.flush_is_needed and not s.refresh_size()
    assert s.submit_chunk in (4, 32)
    flags = fcntl.fcntl(s.fd, fcntl.F_GETFL)
    assert bool(flags & os.O_DIRECT) == s.direct and not flags & os.O_NONBLOCK


def test_buffered_and_durable_by_option(opened: Any, image: Path) -> None:
    s = opened(f"{image},direct=no,cache=writethrough,discard=off")
    assert not s.direct and s.submit_chunk == 32 and not s.can_flush and not s.can_discard
    s.close()
    s = opened(f"{image},mode=r", identity="2")
    assert s.readonly and not s.can_discard and not s.can_flush


def test_direct_io_over_a_network_is_the_operators_word(
    opened: Any, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image's file system stands in for NFS: all but its number is real."""
    plain = opened(image)
    plain.close()
    if not plain.direct:
        pytest.skip("this file system has no O_DIRECT")
    fd = os.open(image, os.O_RDONLY)
    monkeypatch.setitem(file_store._OVER_NETWORK, file_store._file_system(fd), "NFS")
    os.close(fd)
    for text, safe, direct in (("", False, False), ("", True, True), (",direct=yes", False, True),
                               (",direct=no", True, False)):  # fmt: skip
        spec = replace(parse_disk(f"{image},mode=w!{text}"), direct_io_safe=safe)
        with open_store(spec, run_dir="/nonexistent", identity=f"{text}{safe}") as s:
            assert s.direct == direct == bool(fcntl.fcntl(s.fd, fcntl.F_GETFL) & os.O_DIRECT), (text, safe)
            assert s.submit_chunk == (4 if direct else 32)
            assert ("buffered (on NFS, without direct-io-safe)" in s.describe()) == (text == "" and not safe)


def test_unsafe_answers_flushes_and_does_none(opened: Any, image: Path) -> None:
    s = opened(f"{image},cache=unsafe")
    assert s.can_flush and not s.flush_is_needed


def test_discard_frees_and_reads_as_zero(opened: Any, image: Path) -> None:
    from pvdrivers.storage import uring

    from .driver import open_ring, result

    s = opened(image)
    if not s.can_discard:
        pytest.skip("this file system has no holes")
    with open_ring("no-threads") as ring:
        assert result(ring.address, uring.queue_fallocate(ring.address, s.fd, PUNCH_HOLE, 8192, 4096, 1)) == 0
    assert image.read_bytes()[8192:12288] == bytes(4096) and image.stat().st_size == 1 << 20


def test_where_it_is(image: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.img"
    link.symlink_to(image)
    assert place_of(parse_disk(f"{link},direct=no,mode=r")) == place_of(parse_disk(str(image))) == f"file:{image}"
    assert place_of(parse_disk(str(tmp_path / "none.img"))) == "" == place_of(None)
    assert place_of(parse_disk("memory:64M,queues=1")) == "memory:64M"


@pytest.mark.root
def test_where_a_block_device_is(image: Path, tmp_path: Path) -> None:
    with loop_device(image) as device:
        number = os.stat(device).st_rdev
        other = tmp_path / "other"
        os.mknod(other, 0o600 | stat.S_IFBLK, number)
        place = f"block:{os.major(number)}:{os.minor(number)}"
        assert place_of(parse_disk(device)) == place_of(parse_disk(str(other))) == place


def test_live_resize(opened: Any, image: Path) -> None:
    s = opened(image)
    os.truncate(image, (2 << 20) + 100)
    assert s.refresh_size() and s.sectors == 4096
    os.truncate(image, 1 << 19)
    assert s.refresh_size() and s.sectors == 1024
    assert not s.refresh_size()


def test_memory_survives_its_backend_and_not_its_device(opened: Any, tmp_path: Path) -> None:
    s = opened("memory:1M")
    assert (s.kind, s.size) == (STORE_MEMORY, 1 << 20) and s.can_secure_discard
    ctypes.memmove(s.address + 512, b"still here", 10)
    s.close()
    s = opened("memory:1M", recover=True)
    assert ctypes.string_at(s.address + 512, 10) == b"still here"
    s.close()
    assert ctypes.string_at(opened("memory:1M", identity="other").address + 512, 10) == bytes(10)
    s = opened("memory:1M")
    assert ctypes.string_at(s.address + 512, 10) == bytes(10), "not recovered, so a new disk"
    s.close(final=True)
    assert [p.name for p in (tmp_path / "run").iterdir() if "51712" in p.name] == []
    with pytest.raises(StoreError, match="contents of memory:1M are gone"):
        opened("memory:1M", recover=True)


def test_memory_of_another_size_is_not_taken_over(opened: Any) -> None:
    opened("memory:1M").close()
    with pytest.raises(StoreError, match="1048576 bytes where memory:2M has 2097152"):
        opened("memory:2M", recover=True)


def test_memory_is_served_once(opened: Any) -> None:
    opened("memory:1M")
    with pytest.raises(DeviceBusyError, match="in use"):
        opened("memory:1M")


def test_memory_that_cannot_be_mapped_stays_free(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock is left on it: the disk is opened as soon as there are mappings again."""

    def refuses(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("mmap.mmap", refuses)
        with pytest.raises(StoreError, match="memory for memory:1M: Cannot allocate memory"):
            opened("memory:1M")
    assert opened("memory:1M").size == 1 << 20


@pytest.mark.root
def test_no_room_for_memory(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "1M") as run_dir:
        with pytest.raises(StoreError, match=r"no room for 64M.*1M are free.*remount") as e:
            open_store(parse_disk("memory:64M"), run_dir=run_dir, identity="1")
        assert "No space left" in str(e.value)
        assert list(run_dir.iterdir()) == [], "what could not be had is left behind"


def make(path: Path, what: str) -> Path:
    """A thing that is no disk."""
    if what == "empty":
        path.touch()
    elif what == "odd":
        path.write_bytes(bytes(1000))
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "dangling":
        path.symlink_to("nowhere")
    elif what == "512s":
        path.write_bytes(bytes(512 * 9))
    return path


@pytest.mark.parametrize(
    ("what", "options", "said"),
    [
        ("missing", "", r"there is no such file; truncate -s 10G"),
        ("dangling", "", "there is no such file"),
        ("directory", "", "is a directory; a disk is a file or a block device"),
        ("fifo", "", "neither a file nor a block device"),
        ("empty", "", "is empty; give it a size"),
        ("odd", "", "1000 bytes is no multiple of the sector size, 512; use truncate"),
        ("512s", ",sector_size=4096", "no multiple of the sector size, 4096; use sector_size=512"),
    ],
)
def test_what_is_no_disk(opened: Any, tmp_path: Path, what: str, options: str, said: str) -> None:
    path = make(tmp_path / "it", what)
    with pytest.raises(StoreError, match=said) as e:
        opened(f"{path}{options}")
    assert str(path) in str(e.value)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may do all, so permissions are tested as somebody else."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.root
def test_permissions(opened: Any, image: Path) -> None:
    for parent in image.parents:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    image.chmod(0o444)
    with as_nobody():
        with pytest.raises(StoreError, match="can be read but not written.*use mode=r"):
            opened(image)
        opened(f"{image},mode=r").close()
    image.chmod(0o400)
    with as_nobody(), pytest.raises(StoreError, match="Permission denied for user 65534"):
        opened(f"{image},mode=r")


@pytest.mark.root
def test_a_read_only_file_system(opened: Any, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "ro", "1M") as where:
        (where / "d.img").write_bytes(bytes(4096))
        run("mount", "-o", "remount,ro", where)
        with pytest.raises(StoreError, match="can be read but not written.*Read-only"):
            opened(where / "d.img")
        opened(f"{where}/d.img,mode=r").close()


@pytest.mark.root
def test_a_block_device(opened: Any, image: Path) -> None:
    with loop_device(image) as device:
        s = opened(device)
        assert s.block and (s.size, s.sector_size) == (1 << 20, 512) and "block device" in s.describe()
        with pytest.raises(DeviceBusyError, match="in use"):
            opened(device, identity="2")
        os.truncate(image, 3 << 20)
        run("losetup", "--set-capacity", device)
        assert s.refresh_size() and s.sectors == 6144
        s.close()


@pytest.mark.root
def test_a_mounted_device_is_not_written(opened: Any, tmp_path: Path, require_program: Any) -> None:
    image = tmp_path / "fs.img"
    with open(image, "wb") as f:
        f.truncate(4 << 20)
    run(require_program("/*sbin/mke2fs", "e2fsprogs"), "-q", image)
    with loop_device(image) as device:
        where = tmp_path / "mnt"
        where.mkdir()
        run("mount", device, where)
        try:
            with pytest.raises(DeviceBusyError, match=r"O_EXCL.*mounted"):
                opened(device)
            opened(f"{device},mode=r").close()
        finally:
            run("umount", where)


@pytest.mark.root
def test_a_read_only_device(opened: Any, image: Path) -> None:
    with loop_device(image, "--read-only") as device:
        with pytest.raises(StoreError, match="read only|not written"):
            opened(device)
        assert opened(f"{device},mode=r").readonly


@pytest.mark.root
def test_a_device_with_large_sectors(opened: Any, image: Path) -> None:
    """It is shown as it is, or, with sector_size=512, used through the page cache, or refused."""
    with loop_device(image, "--sector-size", "4096") as device:
        s = opened(device)
        assert s.sector_size == 4096
        s.close()
        s = opened(f"{device},sector_size=512")
        assert s.sector_size == 512 and not s.direct
        s.close()
        with pytest.raises(ConfigError, match=r"option direct=yes.*sector_size=4096"):
            opened(f"{device},sector_size=512,direct=yes")
