"""Where io_uring is refused - here by a seccomp filter, as containers have it - the software ring takes over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pvdrivers.storage.uring import Uring

ROOT = Path(__file__).resolve().parents[2]

REFUSED = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
# BPF: load the number of the system call; io_uring_setup (425) fails with EPERM, all else is allowed.
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7FFF0000)]
filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *c) for c in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(filters)))
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program, 0, 0) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP

from pvdrivers.errors import PlatformError
from pvdrivers.storage import uring
from tests.storage.driver import Memory, result

try:
    uring.Uring()
except PlatformError as e:
    print("refused:", e)
with uring.Uring.open() as ring:
    print(ring.kind, "because", ring.reason)
    uring.enable(ring.address)
    memory = Memory(4096)
    fd = os.open(sys.argv[1], os.O_RDONLY)
    print(result(ring.address, uring.queue_rw(ring.address, uring.IORING_OP_READ, fd, memory.address, 4096, 0, 1)))
"""


def test_io_uring_is_refused(image: Path) -> None:
    r = subprocess.run(
        [sys.executable, "-c", REFUSED, str(image)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert r.returncode == 0, r.stderr
    if "PR_SET_SECCOMP" in r.stderr:
        pytest.skip("no seccomp here")
    refused, chosen, read = r.stdout.splitlines()
    assert "io_uring is forbidden here" in refused and "seccomp" in refused
    assert chosen.startswith("threads because io_uring is forbidden here")
    assert read == "4096"


def test_the_choice_can_be_made() -> None:
    with Uring.open(software=True) as ring:
        assert ring.kind == "threads" and ring.reason == "asked for"
    with Uring.open() as ring:
        assert ring.kind == "io_uring" or ring.reason
