"""A full run directory, a full file system, a device that breaks, other daemons, a cache that is not ours alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pvdrivers.cli import EXIT_UNAVAILABLE
from tests.badinput.conftest import Operator
from tests.hostile_frontend import FLUSH, READ, WRITE, Frontend, request, until
from tests.restart.bed import Bed


def cli(*words: str, timeout: float = 60, user: int | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    """A command line to its end."""
    return subprocess.run([sys.executable, "-m", "pvdrivers", *words], capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, **extra}, user=user)  # fmt: skip


def one_error(done: subprocess.CompletedProcess[str], *words: str, status: int = 1) -> None:
    """The status, and one line for people."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pvdrivers: error: "), done.stderr
    for word in words:
        assert word in last, last


def test_no_embedded_xen(tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing")
    one_error(cli("serve", "--run-dir", nothing), nothing, "pvdrivers sim", status=EXIT_UNAVAILABLE)


@pytest.mark.slow
def test_a_second_daemon(operator: Operator) -> None:
    """All that is there is another's: it says who has it, and goes; the first serves on."""
    with operator.attached("memory:1M") as front:
        ring = front.connect()
        one_error(cli("serve", "--run-dir", str(operator.bed.run_dir)), f"vbd-{front.domid}-51712",
                  f"pid {operator.backend.popen.pid}", "--domain")  # fmt: skip
        assert front.ask(ring, request(FLUSH)) == [0]


def test_a_cache_that_others_can_write(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    done = cli("warm", PVDRIVERS_CACHE_DIR=str(cache))
    one_error(done, str(cache), "0777", "chmod 700", "PVDRIVERS_CACHE_DIR")
    cache.chmod(0o700)
    os.chmod(tmp_path, 0o777)
    one_error(cli("warm", PVDRIVERS_CACHE_DIR=str(cache)), str(tmp_path), "rename")


@pytest.mark.root
def test_a_cache_of_somebody_else(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    os.chown(cache, 65534, 65534)
    one_error(cli("warm", PVDRIVERS_CACHE_DIR=str(cache)), str(cache), "owner 65534")


def test_a_run_directory_without_room(small_fs: Callable[..., Path], tmp_path: Path) -> None:
    """Journal, statistics and a disk in memory cannot be made: said once each, nothing lost, over with the cause."""
    run = small_fs(512 << 10) / "run"
    with Bed(run) as bed:
        backend = bed.serve()
        front = Frontend(bed.run_dir, bed.dom0, "memory:4M", memory_mib=4)
        until(lambda: front.key("hotplug-status") == "error")
        text = front.key("hotplug-error") or ""
        assert "no room for 4M" in text and "--run-dir" in text
        front.destroy()

        filler = run.parent / "filler"
        with open(filler, "wb", buffering=0) as f:
            try:
                while True:
                    f.write(bytes(4096))
            except OSError:
                pass
        front = Frontend(bed.run_dir, bed.dom0, "null:1M", memory_mib=4)
        until(lambda: front.backend() == 2 or "claim" in bed.log.read_text())
        ring = front.new_ring()
        if front.backend() == 2:
            front.say(3, **front.keys_of([ring]))
            until(front.error)
            assert "no room" in front.error() or "No space" in front.error(), front.error()
            assert front.backend() == 2, "it waits for room, and nothing is closed"
        filler.unlink()
        front.wait(2, 4)
        front.say(3, **front.keys_of([ring]))
        front.wait(4, timeout=40)
        assert front.ask(ring, request(FLUSH)) == [0]
        until(lambda: not front.error())
        assert sorted(p.name for p in (run / "stats").iterdir()) == [f"vbd-{front.domid}-51712"]
        front.destroy()
        assert backend.end() == 0
        assert "our own fault" not in bed.log.read_text(), bed.log.read_text()


@pytest.mark.slow
def test_a_run_directory_that_cannot_be_written(require_root: None, tmp_path: Path) -> None:
    """The same directory, seen through a mount that is read only."""
    shown = tmp_path / "shown"
    shown.mkdir()
    with Bed(tmp_path / "run") as bed:
        front = Frontend(bed.run_dir, bed.dom0, "null:1M", memory_mib=4)
        subprocess.run(["mount", "--bind", bed.run_dir, shown], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", shown], check=True)
            one_error(cli("serve", "--run-dir", str(shown)), str(shown), "Read-only file system", "writable")
        finally:
            subprocess.run(["umount", "-l", shown], check=True)
        bed.serve()
        assert front.ask(front.connect(), request(FLUSH)) == [0]
        front.destroy()


@pytest.mark.parametrize("direct", ["yes", "no"])
def test_no_space_in_the_middle(operator: Operator, small_fs: Callable[..., Path], direct: str) -> None:
    """A sparse image on a full file system: that write fails, the rest goes on, and it is well when there is room."""
    where = small_fs(1 << 20)
    path = where / "sparse.img"
    path.touch()
    os.truncate(path, 16 << 20)
    (where / "filler").write_bytes(bytes(768 << 10))
    with operator.attached(f"{path},direct={direct}") as front:
        ring = front.connect()
        data, (gref, back) = front.page(2)
        data[:4096] = 0x77
        seen = []
        for i in range(128):
            seen += front.ask(ring, request(WRITE, [(gref, 0, 7)], sector=8 * i))
        assert seen[0] == 0 and seen[-1] == -1 and set(seen) == {0, -1}
        for i in range(128):
            assert front.ask(ring, request(READ, [(back, 0, 7)], sector=8 * i)) == [0]
            assert (data[4096:] == (0x77 if seen[i] == 0 else 0)).all()
        (where / "filler").unlink()
        assert front.ask(ring, request(WRITE, [(gref, 0, 7)], sector=8 * 127)) == [0]


@pytest.mark.parametrize("direct", ["yes", "no"])
def test_a_device_that_breaks(operator: Operator, loop_device: Callable[[Path], str], tmp_path: Path,
                              direct: str) -> None:  # fmt: skip
    """EIO from below (a loop device whose file was cut): that request fails, those of the good part go on."""
    path = tmp_path / "below.img"
    path.write_bytes(b"\x11" * (1 << 20))
    device = loop_device(path)
    with operator.attached(f"{device},direct={direct}") as front:
        ring = front.connect()
        _, (gref,) = front.page()
        os.truncate(path, 256 << 10)
        statuses = front.ask(ring, *[request(READ, [(gref, 0, 7)], id=i, sector=256 * i) for i in range(8)])
        assert statuses[:2] == [0, 0] and set(statuses[2:]) <= {0, -1}
        os.truncate(path, 1 << 20)
        assert front.ask(ring, request(WRITE, [(gref, 0, 7)], sector=1024), request(FLUSH, id=1)) == [0, 0]


def test_the_statistics_name_what_was_wrong(operator: Operator) -> None:
    """`pvdrivers stats --json` of a guest that sends nonsense."""
    import json

    with operator.attached("memory:1M") as front:
        ring = front.connect()
        assert front.ask(ring, *[request(200, id=i) for i in range(7)]) == [-2] * 7
        assert front.ask(ring, request(READ, [(30000, 0, 7)])) == [-1]
        found = json.loads(cli("stats", "--json", "--run-dir", str(operator.bed.run_dir)).stdout)
        mine = next(d for d in found if d["device"] == f"vbd-{front.domid}-51712")
        assert mine["domid"] == front.domid
        queue = mine["queues"][0]
        assert queue["requests"]["rejected"] == 7 and queue["errors"] == 8 and queue["map_failures"] == 1


@pytest.mark.root
def test_an_unreadable_image(tmp_path: Path) -> None:
    """For a daemon that is not root: an image of somebody else."""
    import pvdrivers.storage.file_store  # noqa: F401 - now: the checkout may be where the other user cannot read
    from pvdrivers.errors import StoreError  # by the store itself: a daemon of another user has no embedded Xen here
    from pvdrivers.storage.store import open_store
    from pvdrivers.storage.uri import parse_disk

    path = tmp_path / "secret.img"
    path.write_bytes(bytes(4096))
    path.chmod(0o600)
    for above in [tmp_path, *list(tmp_path.parents)[:2]]:
        above.chmod(0o711)
    before = os.geteuid()
    os.seteuid(65534)
    try:
        with pytest.raises(StoreError, match="Permission denied for user 65534; change its permissions"):
            open_store(parse_disk(f"{path},mode=r"), run_dir=tmp_path, identity="x")
    finally:
        os.seteuid(before)
