"""The network of the demonstration: each of the ways in which its two guests can talk, and namespaces for anybody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvdrivers.cli.children import Children
from pvdrivers.cli.demo_guest import _block, _numbered
from pvdrivers.cli.demo_net import Talk

root = [
    pytest.mark.skipif(os.geteuid() != 0, reason="root has namespaces for certain"),
    pytest.mark.root,
]


@pytest.fixture(scope="module")
def xen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    run_dir.mkdir(mode=0o700)
    with Children(run_dir) as children:
        children.start("sim")
        children.start("serve", "--class", "vif")
        yield run_dir


@pytest.mark.jit_only("a real daemon serves")
@pytest.mark.parametrize("links", [pytest.param("tap", marks=root), pytest.param("veth", marks=root), ""])
def test_two_guests_talk(xen: Path, links: str) -> None:
    with Talk(xen, tuple(filter(None, [links]))) as talk:
        said = talk.wait()
        assert talk.tcp == bool(links), said
        assert {"tap": "with a TAP", "veth": "with a veth", "": "there is no TCP here"}[links] in said
        talk.start(1.0)
        passed, right = talk.finish()
    assert right and "every byte compared" in passed, passed
    assert ("by TCP, both ways" if links else "in packets") in passed


@pytest.mark.jit_only("a real daemon serves")
def test_wrong_bytes_are_told(xen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Talk(xen, ()) as talk:
        talk.wait()
        talk.start(0.2)
        hear = talk._agents[1].hear
        monkeypatch.setattr(talk._agents[1], "hear", lambda seconds: {**hear(seconds), "right": False})
        passed, right = talk.finish()
    assert not right and "NOT what was sent" in passed


def test_what_is_sent_differs_from_block_to_block() -> None:
    assert _block(7) == _block(7) != _block(8)
    first = bytes(_numbered(_block(7), 1))
    assert first != _numbered(_block(7), 2) and first[8:] == _block(7)[8:]


ANYBODY = """
import ctypes, os, socket
from pvdrivers import interfaces
from pvdrivers.cli import namespace
os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: a program that was started by this user is
namespace.enter()
interfaces.up("lo")
namespace.make_veth("eth0", "vif0")
interfaces.set_hardware_address("eth0", bytes.fromhex("00163e000001"))
interfaces.set_address("eth0", "10.0.0.1")
interfaces.up("eth0")
print(*(name for _, name in socket.if_nameindex()))
try:
    namespace.make_veth("eth0", "vif0")
except OSError as e:
    print(e)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.root
def test_anybody_has_a_namespace() -> None:
    if Path("/proc/sys/user/max_user_namespaces").read_text().strip() == "0":
        pytest.skip("this kernel has no user namespaces for anybody")
    done = subprocess.run([sys.executable, "-c", ANYBODY], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    names, again = done.stdout.splitlines()
    assert {"eth0", "lo", "vif0"} <= set(names.split())
    assert "File exists" in again
