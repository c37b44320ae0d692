"""netfront's TAP with a kernel behind it: as many queues as its vif has, and flows by each of them both ways, when
another connection has more or fewer."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import pytest

from netback.links import in_namespace
from pvdrivers.frontends import netfront_tap

from . import test_full
from .conftest import Guest, until
from .packets import ones
from .spaces import Namespace

pytestmark = [
    pytest.mark.jit_only("a real daemon serves"),
    pytest.mark.skipif(os.geteuid() != 0, reason="root makes network namespaces"),
    pytest.mark.root,
]
space = test_full.space
ALL = set(range(40))
HERE, THERE, PORT = "10.97.0.1", "10.97.0.9", 9


def udp(number: int) -> bytes:
    """One of many flows from THERE to HERE, with its number in it."""
    addresses = socket.inet_aton(THERE) + socket.inet_aton(HERE)
    ip = b"\x45\0\0\x1d\0\0\0\0\x40\x11"
    head = ip + (ones(ip, addresses) ^ 0xFFFF).to_bytes(2, "big") + addresses
    return head + (2000 + number).to_bytes(2, "big") + PORT.to_bytes(2, "big") + b"\0\x09\0\0" + bytes([number])


class Stack:
    """The kernel of a guest, in a namespace, and a guest without one that it talks to."""

    def __init__(self, net: Any, space: Namespace, queues: int) -> None:
        netfront_tap.warm()
        self.net, self.other = net, net.guest()
        self.guest: Guest = net.guest(be={"queues": queues}, queues=4)
        self.tap = in_namespace(space.name, lambda: netfront_tap.Tap(self.guest.vif, "eth0"))
        space.run("ip", "addr", "add", f"{HERE}/24", "dev", "eth0")
        space.run("ip", "neigh", "add", THERE, "lladdr", self.other.mac.hex(":"), "dev", "eth0")
        self.sockets = in_namespace(
            space.name, lambda: [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in (*ALL, "to receive by")]
        )
        self.sockets[-1].bind((HERE, PORT))
        self.sockets[-1].settimeout(0.2)

    def goes(self) -> set[int]:
        """Flows that come out of it."""
        for number in ALL:
            self.sockets[number].sendto(bytes([number]), (THERE, PORT))
        return self._heard(lambda: self.other.vif.receive(0.2)[42])

    def comes(self) -> set[int]:
        """Flows that it is reached by."""
        for number in ALL:
            self.other.vif.send(self.other.frame(self.guest, udp(number), 0x800))
        return self._heard(lambda: self.sockets[-1].recv(100)[0])

    def _heard(self, receive: Any) -> set[int]:
        got: set[int] = set()
        try:
            while not got >= ALL:
                got.add(receive())
        except TimeoutError:
            pass
        return got

    def connect_anew(self, queues: int) -> None:
        vif, before = self.guest.vif, self.guest.vif.connections
        self.net.dom0.store.write(f"{self.guest.backend}/queues", queues)
        self.net.dom0.store.write(f"{self.guest.backend}/state", 5)  # the backend closes
        until(lambda: vif.connections == before + 1 and vif.state == 4, 20)
        assert len(vif.queues) == queues

    def end(self) -> None:
        self.tap.close()
        for one in self.sockets:
            one.close()


@pytest.mark.parametrize("counts", [(4, 1, 4), (1, 4, 2, 3)], ids=str)
def test_as_many_queues_as_each_connection_has(net: Any, space: Namespace, counts: tuple[int, ...]) -> None:
    stack = Stack(net, space, counts[0])
    try:
        for turn, queues in enumerate(counts):
            if turn > 0:
                stack.connect_anew(queues)
            until(lambda: stack.comes() >= ALL and stack.goes() >= ALL, 20)
            received = [int(queue.record[0]["received"]) for queue in stack.guest.vif.queues]
            assert len(received) == queues and all(received), "by each of them"
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("tap-eth0-")]
        assert len(threads) == max(counts)
    finally:
        stack.end()
    assert not any(thread.name.startswith("tap-eth0-") for thread in threading.enumerate())
