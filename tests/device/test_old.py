"""The daemon that is to be followed, and successors that do not do: it serves on, and who asked is told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pvdrivers import daemons, journal, link
from pvdrivers.device import DeviceId
from pvdrivers.upgrade import Old
from pvdrivers.xenbus import XenbusState as S
from tests.device.bed import Disk, Guest
from tests.device.yard import Daemon, Yard, break_connection, connect, until

SUCCESSOR = """
import socket
from pvdrivers.link import link_of_successor, receive, send
sock = link_of_successor()
send(sock, event="warm", pid=1, version="9.9", journals=[{layout!r}]{more})
while (message := receive(sock)) is not None and message["event"] != "all":
    pass
"""


class Followed:
    """A daemon with a socket for upgrades; its successors run the script that there is."""

    def __init__(self, yard: Yard) -> None:
        self.yard = yard
        self.daemon: Daemon = yard.daemon()
        self.old: Any = None
        self.path = yard.run_dir / "old.sock"
        self.on_control_thread(self._make)

    def on_control_thread(self, call: Callable[[], None]) -> None:
        done = threading.Event()

        def run(*_: object) -> None:
            call()
            done.set()

        self.daemon.host.submit(lambda: None, run)
        assert done.wait(10)

    def _make(self) -> None:
        listener = daemons.listen(self.path)
        self.yard.stack.callback(listener.close)
        self.old = Old(self.daemon.host, listener, ["python", "-c", ""], lambda pid: None)

    def is_followed_by(self, more: str = "") -> None:
        self.old._command[2] = SUCCESSOR.format(layout=journal.layout(), more=more)

    def ask(self) -> socket.socket:
        sock = daemons.connect(self.path)
        self.yard.stack.callback(sock.close)
        sock.settimeout(20)
        link.send(sock, do="upgrade", timeout=20)
        return sock

    def upgrade(self) -> dict[str, Any]:
        """How it ends."""
        return last(self.ask())


def last(sock: socket.socket) -> dict[str, Any]:
    message: dict[str, Any] = {}
    while (heard := link.receive(sock)) is not None:
        message = heard
    return message


@pytest.fixture
def followed(yard: Yard) -> Followed:
    return Followed(yard)


def test_a_successor_that_leaves_a_class_out(yard: Yard, followed: Followed) -> None:
    """The kernel's driver was loaded meanwhile, say: its disks would be nobody's."""
    guest = yard.guest(5)
    connect(guest)
    followed.is_followed_by(", classes=['pvblk']")
    message = followed.upgrade()
    assert message["event"] == "failed" and "it does not serve vbd-5-51712, which nobody would have" in message["why"]
    assert followed.daemon.disks["vbd-5-51712"].calls == ["advertise", "connect"]
    guest.unplug()
    guest.say(S.Closed)
    until(lambda: not followed.daemon.host.lives)
    assert "it ended with status" in followed.upgrade()["why"], "it has nothing that would be lost"


@pytest.mark.parametrize("more", ["", ", classes=['pvblk', 'vbd']"], ids=["does not tell", "serves it"])
def test_one_that_does_not(yard: Yard, followed: Followed, more: str) -> None:
    """A version that does not tell is taken to serve what it is asked to. Here it ends with all in hand."""
    connect(yard.guest(5))
    followed.is_followed_by(more)
    message = followed.upgrade()
    assert message["event"] == "failed" and "it ended with status" in message["why"]
    until(lambda: followed.daemon.host.lives["vbd", 5, 51712].connected)
    assert followed.daemon.disks["vbd-5-51712"].calls == ["advertise", "recover"]


def test_the_store_is_lost_as_all_is_taken_back(
    yard: Yard, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(yard.guest(5))
    finder, taken = followed.daemon.host.finder, [0]
    take = finder.take_waiting

    def take_waiting() -> None:
        taken[0] += 1
        break_connection(followed.daemon)
        take()

    monkeypatch.setattr(finder, "take_waiting", take_waiting)
    followed.is_followed_by()
    for times in (1, 2):
        message = followed.upgrade()
        assert message["event"] == "failed" and "it ended with status" in message["why"]
        assert taken == [times]
        until(lambda: followed.daemon.host.lives["vbd", 5, 51712].connected)


def test_one_at_a_time(yard: Yard, followed: Followed) -> None:
    """What a successor left is being taken back: the next one has to wait, and the first who asked is told."""
    connect(yard.guest(5))
    stuck = followed.daemon.stuck["vbd-5-51712"] = threading.Event()
    followed.is_followed_by()
    first = followed.ask()
    until(lambda: followed.daemon.disks["vbd-5-51712"].calls[-1] == "hand_over")
    ending, stuck = stuck, threading.Event()
    followed.daemon.stuck["vbd-5-51712"] = stuck
    ending.set()
    until(lambda: followed.old._now.name == "TAKING_BACK")
    assert "under way already" in followed.upgrade()["why"]
    stuck.set()
    assert "it ended with status" in last(first)["why"]
    del followed.daemon.stuck["vbd-5-51712"]
    assert "it ended with status" in followed.upgrade()["why"]


def test_a_device_of_a_class_that_is_not_served(yard: Yard, followed: Followed) -> None:
    """A predecessor has released it: no claim is taken, which another daemon may want."""
    Guest(yard.dom0, yard.dom0, 5).attach()
    back = "/local/domain/0/backend/pvblk/5/51712"
    for key, value in (("frontend", "/local/domain/5/device/vbd/51712"), ("state", 4)):
        yard.dom0.write(f"{back}/{key}", value)
    host = followed.daemon.host
    until(lambda: host.lives)
    followed.on_control_thread(lambda: host.finder.find("pvblk", 5, 51712))
    assert set(host.lives) == {("vbd", 5, 51712)} and not host.claims.held(DeviceId(0, "pvblk", 5, 51712, ""))


def test_a_class_that_cannot_be_made(yard: Yard, own_fault: None) -> None:
    """Its claim is given back: another daemon may do better."""
    daemon = yard.daemon()
    made = []

    def make(ident: Any, context: Any) -> Disk:
        made.append(ident)
        if len(made) == 1:
            raise RuntimeError("not this time")
        return Disk(ident, context)

    daemon.host.finder.classes = {"vbd": make}  # type: ignore[dict-item]
    guest: Guest = yard.guest(5)
    guest.attach()
    until(lambda: made)
    second = yard.daemon()
    until(lambda: "vbd-5-51712" in second.disks)
