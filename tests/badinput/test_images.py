"""What an operator does wrong with an image: one message that says what, where and what next, and nothing lost."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.badinput.conftest import Operator
from tests.hostile_frontend import FLUSH, INIT_WAIT, READ, WRITE, Frontend, request, until
from tests.restart.bed import Bed, Process


def works(front: Frontend) -> None:
    ring = front.connect()
    _, (gref,) = front.page()
    assert front.ask(ring, request(READ, [(gref, 0, 7)])) == [0]


def test_missing(operator: Operator) -> None:
    path = operator.top / "no-such.img"
    operator.refused(str(path), str(path), "there is no such file", f"truncate -s 10G {path}")
    operator.refused("/no/such/directory/x.img", "there is no such file", "check the path")


def test_made_after_all(operator: Operator) -> None:
    """The operator mends it, and the device goes on by itself."""
    path = operator.top / "late.img"
    with operator.attached(str(path)) as front:
        operator.error(front)
        path.write_bytes(bytes(1 << 20))
        works(front)
        assert not front.error() and front.key("hotplug-status") == "connected"


@pytest.mark.parametrize("params, words", [
    ("", ["params", "empty"]),
    ("http://host/disk", ["http"]),
    ("qcow2", ["qcow2"]),
    ("memory:12X", ["12X"]),
    ("memory:0", ["0"]),
    ("null:1P", ["1P"]),
    ("memory:1M,queues=0", ["queues", "0", "from 1"]),
    ("memory:1M,nonsense=1", ["nonsense"]),
    ("memory:1M,policy=fast", ["policy", "fast", "copy"]),
    ("memory:1M,mode=x", ["mode", "x"]),
    ("/dev/shm", ["is a directory"]),
    ("/dev/null", ["neither a file nor a block device"]),
])
def test_params_that_make_no_sense(operator: Operator, params: str, words: list[str]) -> None:
    with operator.attached(params) as front:
        text = operator.error(front)
        assert all(word in text for word in words) or params == "", text
        assert "Traceback" not in text and len(text) < 400
        operator.bed.dom0.store.write(f"{front.back}/params", "memory:1M")
        works(front)


def test_an_empty_image_and_a_ragged_one(operator: Operator) -> None:
    operator.refused(str(operator.image("empty.img", 0)), "is empty", "truncate")
    operator.refused(str(operator.image("ragged.img", 1000)), "1000 bytes", "truncate -s %512")


def test_read_only_asked_writable(operator: Operator, small_fs: Callable[..., Path]) -> None:
    where = small_fs(4 << 20)
    path = where / "disk.img"
    path.write_bytes(bytes(1 << 20))
    subprocess.run(["mount", "-o", "remount,ro", where], check=True)
    operator.refused(str(path), "can be read but not written", "mode=r")
    with operator.attached(str(path), mode="r") as front:
        ring = front.connect()
        assert int(front.key("info") or 0) & 4
        _, (gref,) = front.page()
        assert front.ask(ring, request(READ, [(gref, 0, 7)]), request(WRITE, [(gref, 0, 7)], id=1)) == [0, -1]


def held(operator: Operator, path: Path, *words: str) -> None:
    operator.refused(str(path), str(path), "in use", *words)


def test_in_use_by_flock(operator: Operator, require_program: Callable[[str, str], str]) -> None:
    path = operator.image("flocked.img")
    holder = subprocess.Popen([require_program("flock", "util-linux"), path, "-c", "echo; read x"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert holder.stdin and holder.stdout
    try:
        holder.stdout.readline()
        held(operator, path, "flock")
    finally:
        holder.communicate(b"\n", 10)
    with operator.attached(str(path)) as front:
        works(front)


def test_in_use_by_qemu(operator: Operator, require_program: Callable[[str, str], str]) -> None:
    path = operator.image("qemu.img")
    qemu = subprocess.Popen([require_program("qemu-io", "qemu-utils"), "-f", "raw", str(path)],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert qemu.stdin and qemu.stdout
    try:
        qemu.stdin.write(b"read 0 512\n")
        qemu.stdin.flush()
        qemu.stdout.readline()
        held(operator, path, "QEMU")
    finally:
        qemu.communicate(b"quit\n", 10)


def test_the_same_image_twice_and_sharing_it(operator: Operator) -> None:
    path = operator.image("twice.img")
    with operator.attached(str(path)) as front:
        works(front)
        held(operator, path, "this process, for another disk", "mode=r", "w!")
        operator.refused(str(path), "in use", mode="r")
    with operator.attached(str(path), mode="w!") as front, operator.attached(str(path), mode="w!") as other:
        works(front)
        works(other)
        held(operator, path)
    with operator.attached(str(path), mode="r") as front, operator.attached(str(path), mode="r") as other:
        works(front)
        works(other)
        held(operator, path)


def test_in_use_by_another_daemon(operator: Operator, tmp_path: Path) -> None:
    path = operator.image("daemons.img")
    with operator.attached(str(path)) as front:
        works(front)
        xen = Process("sim", "--run-dir", str(tmp_path / "run"), log=tmp_path / "sim.log")
        try:
            from pvdrivers.platform import open_platform

            backend = Process("serve", "--run-dir", str(tmp_path / "run"), log=tmp_path / "serve.log")
            dom0 = open_platform("sim", run_dir=tmp_path / "run")
            second = Frontend(tmp_path / "run", dom0, str(path), memory_mib=4)
            until(lambda: second.key("hotplug-status") == "error")
            text = second.key("hotplug-error") or ""
            assert f"process {operator.backend.popen.pid}" in text and "in use" in text
            second.destroy()
            dom0.close()
            backend.end()
        finally:
            xen.end()
        assert front.ask(front.rings[0], request(FLUSH)) == [0]


def test_exclusive_block_devices(operator: Operator, loop_device: Callable[[Path], str]) -> None:
    device = loop_device(operator.image("loop.img"))
    fd = os.open(device, os.O_RDWR | os.O_EXCL)
    try:
        operator.refused(device, device, "in use", "O_EXCL", "unmount it")
    finally:
        os.close(fd)
    with operator.attached(device) as front:
        works(front)
        with pytest.raises(OSError):
            os.open(device, os.O_RDWR | os.O_EXCL)


def test_live_resize(operator: Operator) -> None:
    """truncate, SIGHUP, and the guest sees it; smaller works too, and what is in flight fails or is done."""
    path = operator.image("grows.img")
    with operator.attached(str(path)) as front:
        ring = front.connect()
        _, (gref,) = front.page()
        beyond = request(WRITE, [(gref, 0, 7)], sector=2048)
        assert front.ask(ring, beyond) == [-1]
        for size in (4 << 20, 2 << 20, 8 << 20):
            os.truncate(path, size)
            operator.backend.popen.send_signal(1)
            until(lambda size=size: front.key("sectors") == str(size // 512), what="for the new size")
            assert front.backend() == 4
            assert front.ask(ring, beyond) == [0]


@pytest.mark.parametrize("direct", ["yes", "no"])
def test_truncated_while_in_use(operator: Operator, tmp_path: Path, direct: str) -> None:
    """What lies beyond the new end fails, the rest goes on, and it is well again when the file is."""
    path = tmp_path / "shrinks.img"
    path.write_bytes(b"\x55" * (1 << 20))
    with operator.attached(f"{path},direct={direct}") as front:
        ring = front.connect()
        _, (gref,) = front.page()
        read = [request(READ, [(gref, 0, 7)], id=i, sector=1024 * i) for i in range(2)]
        assert front.ask(ring, *read) == [0, 0]
        os.truncate(path, 512 << 10)
        assert front.ask(ring, *read) == [0, -1]
        os.truncate(path, (512 << 10) + 1000)
        assert front.ask(ring, *read) == [0, -1]
        os.truncate(path, 1 << 20)
        assert front.ask(ring, *read) == [0, 0]
        assert front.ask(ring, request(WRITE, [(gref, 0, 7)], sector=1024)) == [0]


@pytest.mark.slow
def test_sigterm_in_the_middle_of_connecting(tmp_path: Path) -> None:
    """Whatever it was doing, it ends in order and soon; what comes next takes the devices over."""
    with Bed(tmp_path / "run") as bed:
        for turn in range(4):
            backend = bed.serve()
            front = Frontend(bed.run_dir, bed.dom0, "memory:1M", memory_mib=4)
            ring = front.new_ring()
            if turn % 2:
                front.wait(INIT_WAIT)
            front.say(3, **front.keys_of([ring]))
            time.sleep(0.003 * turn)
            began = time.monotonic()
            assert backend.end() == 0
            assert time.monotonic() - began < 10
            bed.serve()
            front.wait(4)
            assert front.ask(ring, request(FLUSH)) == [0]
            front.destroy()
            assert bed.backend is not None
            assert bed.backend.end() == 0
        assert "our own fault" not in bed.log.read_text(), bed.log.read_text()
