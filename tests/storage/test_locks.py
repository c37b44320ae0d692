"""Who else uses an image: between our own processes, with QEMU's programs, and with flock(1)."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdrivers.errors import DeviceBusyError
from pvdrivers.storage.locks import PERM_WRITE, RAW_LOCK_PERM_BASE, byte_is_locked, fence_offset
from pvdrivers.storage.store import DrainingError, Store, open_store
from pvdrivers.storage.uri import parse_disk

ROOT = Path(__file__).resolve().parents[2]
Program = Callable[[str, str], str]


def store(text: object, identity: str = "ours", recover: bool = False, timeout: float = 0.0) -> Store:
    return open_store(
        parse_disk(str(text)), run_dir="/nonexistent", identity=identity, recover=recover, timeout=timeout
    )


@contextlib.contextmanager
def process(*argv: object, says: str = "") -> Iterator[subprocess.Popen[str]]:
    """A program under way, once it has said `says`; killed at the end."""
    p = subprocess.Popen([str(a) for a in argv], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        if says:
            assert p.stdout is not None
            for line in p.stdout:
                if says in line:
                    break
            else:
                pytest.fail(f"{argv}: ended without saying {says!r}")
        yield p
    finally:
        p.kill()
        p.communicate()


def holder(text: object, identity: str = "theirs") -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Another process of ours that has the disk open."""
    return process(sys.executable, "-m", "tests.storage.holder", text, identity, says="open")


@pytest.mark.parametrize("theirs", ["w", "w!", "r"])
@pytest.mark.parametrize("ours", ["w", "w!", "r"])
def test_readers_share_and_writers_only_by_w_bang(image: Path, theirs: str, ours: str) -> None:
    with holder(f"{image},mode={theirs}") as p:
        if ours == theirs != "w":
            store(f"{image},mode={ours}").close()
        else:
            with pytest.raises(DeviceBusyError, match=rf"{image}: in use: .* is held by process {p.pid} \("):
                store(f"{image},mode={ours}")
    store(f"{image},mode={ours}", recover=True, timeout=10).close()


@pytest.mark.parametrize("mode", ["w", "w!", "r"])
def test_a_device_is_served_once_however_it_is_shared(image: Path, mode: str) -> None:
    with holder(f"{image},mode={mode}", "same") as p:
        with pytest.raises(DeviceBusyError, match=f"this very device .* is held by process {p.pid}"):
            store(f"{image},mode={mode}", "same")


def test_two_disks_of_one_process(image: Path) -> None:
    with store(image), pytest.raises(DeviceBusyError, match="held by this process, for another disk"):
        store(image, "other")


def test_a_live_process_is_not_waited_for(image: Path) -> None:
    """Recovery is patient with the dead only."""
    with holder(image, "ours"):
        start = time.monotonic()
        with pytest.raises(DeviceBusyError) as e:
            store(image, recover=True, timeout=30)
        assert not isinstance(e.value, DrainingError)
        assert time.monotonic() - start < 10


@given(st.text(max_size=30), st.text(max_size=30))
def test_fences_are_far_beyond_any_image_and_apart(a: str, b: str) -> None:
    assert (1 << 62) <= fence_offset(a) < (1 << 62) + (1 << 40)
    assert (fence_offset(a) == fence_offset(b)) == (a == b)


def test_flock_of_a_shell_script(image: Path, require_program: Program) -> None:
    flock = require_program("flock", "util-linux")
    with process(flock, "--no-fork", image, "sh", "-c", "echo locked; exec sleep 60", says="locked"):
        with pytest.raises(DeviceBusyError, match="flock"):
            store(image)
        with pytest.raises(DeviceBusyError, match="flock"):
            store(f"{image},mode=w!")
    store(image).close()


def qemu_io(program: str, image: Path, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [program, "-f", "raw", *options, "-c", "read 0 512", str(image)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def test_qemu_respects_us(image: Path, require_program: Program, tmp_path: Path) -> None:
    program, convert = require_program("qemu-io", "qemu-utils"), require_program("qemu-img", "qemu-utils")
    with store(image):
        r = qemu_io(program, image)
        assert r.returncode != 0 and "lock" in r.stderr, r
        r = subprocess.run(
            [convert, "convert", "-f", "raw", "-O", "raw", str(image), str(tmp_path / "copy")],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert r.returncode != 0 and 'shared "write" lock' in r.stderr, r
    with store(f"{image},mode=r"):
        assert qemu_io(program, image, "-r").returncode == 0
        r = qemu_io(program, image)
        assert r.returncode != 0 and "lock" in r.stderr, r
    assert qemu_io(program, image).returncode == 0, "a lock of ours is left"


def test_we_respect_a_writer_of_qemu(image: Path, require_program: Program) -> None:
    program = require_program("qemu-io", "qemu-utils")
    argv = [program, "-f", "raw", "-c", "read 0 512", "-c", "sleep 60000", str(image)]
    with process(*argv) as p, image.open("rb") as looked_at:
        # It says nothing before it ends. To open a store would hold a lock in whose way QEMU gives up.
        _wait_for(lambda: byte_is_locked(looked_at.fileno(), RAW_LOCK_PERM_BASE + PERM_WRITE))
        for mode in "w", "r":
            with pytest.raises(DeviceBusyError, match=rf'QEMU\'s lock "write" is held by process {p.pid} \(qemu-io\)'):
                store(f"{image},mode={mode}")
        store(f"{image},mode=w!").close()
    store(image).close()


def test_a_storage_daemon(image: Path, tmp_path: Path, require_program: Program) -> None:
    """A writable export that is not shared; then a read-only one, beside which we may read."""
    program = require_program("qemu-storage-daemon", "qemu-system-common")
    socket, pidfile = tmp_path / "nbd", tmp_path / "pid"

    def daemon(readonly: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        pidfile.unlink(missing_ok=True)
        socket.unlink(missing_ok=True)
        return process(
            program,
            *("--blockdev", f"driver=file,filename={image},node-name=d,locking=on,read-only={readonly}"),
            *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
            *("--export", f"type=nbd,id=e,node-name=d,writable={'off' if readonly == 'on' else 'on'}"),
            *("--pidfile", pidfile),
        )

    with daemon("off") as p:
        _wait_for(pidfile.exists)
        for mode in "w", "r":
            with pytest.raises(DeviceBusyError, match=rf"QEMU.*process {p.pid} \(qemu-storage-d"):
                store(f"{image},mode={mode}")
    with daemon("on"):
        _wait_for(pidfile.exists)
        store(f"{image},mode=r").close()
    with store(image), daemon("off") as p:
        assert p.wait(20) != 0


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.02)
