"""A vif that is closed, suspended, detached or served by the next version, while packets go both ways."""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
import time
from typing import Any

import pytest

from netback.kept_file import KINDS
from pvdrivers import daemons
from pvdrivers.sim import toolstack

from .conftest import COMMAND, Guest, Net, until

pytestmark = pytest.mark.jit_only("a real daemon serves")


class Traffic:
    """Numbered packets both ways between two guests, of all sizes; each that comes is as it was sent."""

    def __init__(self, a: Guest, b: Guest) -> None:
        self.ends = (a, b)
        self.got = [0, 0]
        self.last = [-1, -1]
        self.wrong: list[str] = []
        self.strange = 0
        self._over = threading.Event()
        calls = (self._send, self._receive)
        self._threads = [threading.Thread(target=call, args=(k,)) for k in (0, 1) for call in calls]

    def _frame(self, k: int, number: int) -> bytes:
        sender, receiver = self.ends[k], self.ends[1 - k]
        size = (50, 1500, 9000, 60000)[number % 4]
        return sender.frame(receiver, number.to_bytes(4, "big") * (size // 4))

    def _send(self, k: int) -> None:
        for number in itertools.count():
            if self._over.is_set():
                return
            try:
                self.ends[k].vif.send(self._frame(k, number), timeout=0.2)
            except (TimeoutError, OSError):
                time.sleep(0.01)
            time.sleep(0.001)

    def _receive(self, k: int) -> None:
        while not self._over.is_set():
            frames = []
            for queue in range(max(1, len(self.ends[k].vif.queues))):
                try:
                    frames += self.ends[k].vif.receive_all(64, 0.02, queue=queue)
                except (TimeoutError, OSError):
                    time.sleep(0.001)
            for frame in frames:
                if frame.data[:12] != self.ends[k].mac + self.ends[1 - k].mac:
                    self.strange += 1  # somebody else's: an address that nobody is known to have is flooded
                    continue
                number = int.from_bytes(frame.data[14:18], "big")
                if frame.data != self._frame(1 - k, number):
                    self.wrong.append(f"packet {number} to {k} is not what was sent")
                if number <= self.last[k] - 512:  # what was not answered may come again, and nothing else
                    self.wrong.append(f"packet {number} to {k} comes behind {self.last[k]}")
                self.last[k] = max(number, self.last[k])
                self.got[k] += 1

    def goes_on(self) -> None:
        """Both ways."""
        before = list(self.got)
        until(lambda: all(now > then + 50 for now, then in zip(self.got, before)), 60)
        assert self.wrong == []

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        assert self.wrong == []


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("options", [{}, {"queues": 2, "be": {"rate": "50000000,50000"}}])
def test_reconnected_under_traffic(net: Any, options: dict[str, Any]) -> None:
    """Its backend closes, as for a change that is negotiated at connect only, and it connects anew."""
    a, b = net.guest(**options), net.guest()
    with Traffic(a, b) as traffic:
        for round in range(1, 4):
            traffic.goes_on()
            net.dom0.store.write(f"{a.backend}/state", 5)
            until(lambda n=round: a.vif.connections == n + 1, 30)
        traffic.goes_on()
    assert a.vif.stats()["stuck_grants"] == b.vif.stats()["stuck_grants"] == 0


def test_suspended_under_traffic(net: Any) -> None:
    """A guest that is saved and restored finds its rings gone and a backend that waits: it makes new ones."""
    a, b = net.guest(), net.guest()
    with Traffic(a, b) as traffic:
        traffic.goes_on()
        a.vif._suspend(0)  # what a resume finds: no ring in use
        store, path = net.dom0.store, f"/local/domain/{a.domain.domid}/device/vif/0"
        net.dom0.store.write(f"{a.backend}/state", 5)
        until(lambda: a.vif.connections == 2, 30)
        assert store.read(f"{path}/state") == b"4"
        traffic.goes_on()


def test_closed_and_detached_under_traffic(net: Any) -> None:
    """CVE-2021-28691 (XSA-374): nobody who sends to it notices, and what waited for it is nobody's."""
    a, b, c = net.guest(), net.guest(), net.guest()
    with Traffic(a, c) as traffic:
        with Traffic(b, net.guest()) as other:
            other.goes_on()
            assert toolstack.detach(net.dom0.store, b.backend, timeout=20)
            until(lambda: not (net.run_dir / "stats" / b.name).exists())
        traffic.goes_on()


def test_upgraded_under_traffic(own: Net) -> None:
    """`pvdrivers upgrade`: the next process has the rings; no guest connects anew, and what is limited stays so."""
    a, b = own.guest(), own.guest(queues=2, be={"rate": "100000000,50000", "mtu": 65521})
    with Traffic(a, b) as traffic:
        traffic.goes_on()
        for _ in range(2):
            before = {one.pid for one in daemons.running(own.run_dir)}
            done = subprocess.run(
                [*COMMAND, "upgrade", "--run-dir", str(own.run_dir)], capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr + own.daemon.log.read_text()
            assert before.isdisjoint(one.pid for one in daemons.running(own.run_dir))
            traffic.goes_on()
    assert a.vif.connections == b.vif.connections == 1


def test_guests_that_come_and_go_leave_nothing(own: Net) -> None:
    """No descriptor, no mapping and no file: by a switch, by nobody, and without ever having connected."""
    pid = own.daemon.popen.pid

    def held() -> tuple[int, int]:
        with open(f"/proc/{pid}/maps") as maps:
            kept = sum(any(f"/{kind}/" in line for kind in (*KINDS, "stats")) for line in maps)
        return len(os.listdir(f"/proc/{pid}/fd")), kept

    def comes_and_goes(bridge: str, **options: Any) -> None:
        guest = own.guest(bridge, **options)
        until(lambda: own.dom0.store.read(f"{guest.backend}/state") in (b"2", b"4"))
        own.guests.remove(guest)
        guest.end()
        until(lambda: f"{guest.name}: removed" in own.daemon.log.read_text())

    def all_kinds() -> None:
        comes_and_goes("null:")
        comes_and_goes("switch:", queues=2)
        comes_and_goes("switch:", connect=False)

    all_kinds()  # the switch is there from now on
    time.sleep(1)  # "removed" is said before all is
    before = held()
    for _ in range(4):
        all_kinds()
    until(lambda: held() == before)
    for kind in KINDS:
        assert os.listdir(own.run_dir / kind) == []
