"""What is full: a TAP that nobody reads, and a guest that does not take what comes by one.

Packets are dropped there and counted there, nobody waits, and it goes on when there is room again.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from netback.links import in_namespace
from pvdrivers.cli.stats import snapshot
from pvdrivers.interfaces import open_tun, take_tap

from .conftest import until
from .spaces import Bridged, Namespace, need
from .test_hostile import talk

pytestmark = [
    pytest.mark.jit_only("a real daemon serves"),
    pytest.mark.skipif(os.geteuid() != 0, reason="root makes network namespaces"),
    pytest.mark.root,
]


_TUNSETSNDBUF = 0x400454D4


@pytest.fixture
def space() -> Iterator[Namespace]:
    need("ip")
    made = Namespace()
    yield made
    made.end()


def counted(net: Any, device: str, kind: str) -> int:
    return sum(q["requests"][kind] for d in snapshot(net.run_dir) if d["device"] == device for q in d["queues"])


def flood(guest: Any, neighbours: tuple[Any, Any], frame: bytes) -> None:
    """Three hundred packets, which wait for nobody."""
    for n in range(300):
        guest.vif.send(frame, timeout=5)
        if n % 50 == 0:
            talk(*neighbours)
    until(lambda: guest.counted("sent") == 300)
    assert guest.counted("refused") == 0 == guest.vif.stats()["tx_errors"]
    assert all(one.counted("dropped") == 0 for one in neighbours)
    assert not any(d.get("error") for d in snapshot(guest.net.run_dir) if d["device"].startswith(guest.name))


def test_a_tap_whose_host_takes_nothing(net: Any) -> None:
    """What it has been given lies before an interface that is slow, and it may have no more of that (TUNSETSNDBUF)."""
    need("tc")
    host = Bridged()
    try:
        guest, a, b = net.guest(f"tap:out0;netns={host.name};bridge=br0"), net.guest(), net.guest()
        host.run("tc", "qdisc", "add", "dev", "veth0", "root", "tbf", "rate", "8kbit", "burst", "2000", "limit", "10MB")

        def limit() -> None:
            fd = open_tun()
            try:
                take_tap(fd, "out0", several=True)
                fcntl.ioctl(fd, _TUNSETSNDBUF, struct.pack("i", 20000))
            finally:
                os.close(fd)

        in_namespace(host.name, limit)
        frame, port = guest.frame(b"\2other", b"x" * 1000), f"{guest.name}.port"
        flood(guest, (a, b), frame)
        until(lambda: counted(net, port, "dropped") + counted(net, port, "received") == 300)
        assert counted(net, port, "dropped") > 200
        assert counted(net, port, "failed") == 0
        host.run("tc", "qdisc", "del", "dev", "veth0", "root")
        before = counted(net, port, "received")
        guest.vif.send(frame)
        until(lambda: counted(net, port, "received") == before + 1)
    finally:
        host.end()


def came_to(fd: int, frame: bytes) -> bool:
    try:
        return frame in os.read(fd, 70000)
    except BlockingIOError:
        return False


def test_a_tap_that_nobody_reads(net: Any, space: Namespace) -> None:
    """As a virtual machine that has been stopped has one, by a packet socket. It has room for ten. What it drops its
    kernel does not tell who sent it: that is counted by the TAP (`ip -s link`)."""

    def make() -> int:
        fd = open_tun()
        take_tap(fd, "full0", several=False)
        return fd

    fd = in_namespace(space.name, make)
    try:
        space.run("ip", "link", "set", "full0", "txqueuelen", "10", "up")
        guest, a, b = net.guest(f"packet:full0;netns={space.name}"), net.guest(), net.guest()
        frame, port = guest.frame(b"\2other", b"x" * 1000), f"{guest.name}.port"
        flood(guest, (a, b), frame)
        until(lambda: counted(net, port, "dropped") + counted(net, port, "received") == 300)
        shown = json.loads(space.run("ip", "-j", "-s", "link", "show", "full0"))
        lost = shown[0]["stats64"]["tx"]["dropped"] + counted(net, port, "dropped")
        came = 0
        while True:  # its reader is back
            try:
                came += frame in os.read(fd, 70000)
            except BlockingIOError:
                break
        assert lost > 200 and 5 <= came <= 100
        guest.vif.send(frame)
        until(lambda: counted(net, port, "received") + counted(net, port, "dropped") == 301)
        until(lambda: came_to(fd, frame))  # the kernel may say something as well
    finally:
        os.close(fd)


def test_a_guest_that_does_not_take_what_comes_by_its_tap(net: Any) -> None:
    host = Bridged()
    try:
        guest, a, b = net.guest(f"tap:out0;netns={host.name};bridge=br0"), net.guest(), net.guest()
        sock = in_namespace(host.peer.name, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        host.peer.run("ip", "neigh", "add", "10.98.0.1", "lladdr", guest.mac.hex(":"), "dev", "eth0")
        with sock:
            for n in range(3000):
                sock.sendto(b"y" * 1000, ("10.98.0.1", 9))
                if n % 500 == 0:
                    talk(a, b)
            until(lambda: guest.counted("dropped") > 100)
            assert a.counted("dropped") == b.counted("dropped") == 0
            took = 0
            try:
                while True:
                    took += len(guest.vif.receive_all(64, 0.2))
            except TimeoutError:
                pass
            assert took >= 256, "a ring full of buffers, and what had waited for more"
            sock.sendto(b"at last", ("10.98.0.1", 9))
            while not guest.vif.receive(5).endswith(b"at last"):
                pass
    finally:
        host.end()
