"""An embedded Xen with a daemon that serves vifs, and guests with a netfront each."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pvdrivers import daemons, sim
from pvdrivers.cli.stats import snapshot
from pvdrivers.frontends import front
from pvdrivers.frontends.netfront import Netfront, warm
from pvdrivers.sim import toolstack

COMMAND = [sys.executable, "-m", "pvdrivers"]
WORKERS = os.environ.get("PVDRIVERS_TEST_WORKERS", "1")
"""Of the daemon that all tests have but those of several workers, which have `several`."""


class Daemon:
    """`pvdrivers serve --class vif`."""

    def __init__(self, run_dir: Path, log: Path, *options: str) -> None:
        self.run_dir, self.options = run_dir, options
        self.log = log
        self.start()

    def start(self, **environ: str) -> None:
        with self.log.open("a") as log:
            self.popen = subprocess.Popen(
                [*COMMAND, "serve", "--run-dir", str(self.run_dir), "--class", "vif", "--workers", WORKERS,
                 *self.options],
                stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **environ},
            )  # fmt: skip
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if line == "" and "PVDRIVERS_TEST_KILL" in environ:  # packets pass before it has said that it is ready
            assert self.popen.wait(20) == -signal.SIGKILL, self.log.read_text()
        else:
            assert line.startswith("ready"), self.log.read_text()

    def kill(self) -> None:
        self.popen.kill()
        self._ended()

    def dies(self, timeout: float) -> None:
        """Wait until it has killed itself (PVDRIVERS_TEST_KILL)."""
        assert self.popen.wait(timeout) == -signal.SIGKILL
        self._ended()

    def _ended(self) -> int:
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        return self.popen.wait(20)

    def stop(self) -> None:
        self.popen.terminate()
        assert self._ended() == 0, self.log.read_text()


class Net:
    """What tests ask for: guests, and what the daemon counts."""

    def __init__(self, dom0: Any, run_dir: Path, daemon: Daemon) -> None:
        self.dom0, self.run_dir, self.daemon = dom0, run_dir, daemon
        self.guests: list[Guest] = []
        self._macs = itertools.count(1)

    def guest(
        self, bridge: str = "switch:", *, mac: bytes | None = None, connect: bool = True, **options: Any
    ) -> Guest:
        guest = Guest(self, bridge, mac or b"\0\x16\x3e\0\0" + bytes([next(self._macs)]), **options)
        self.guests.append(guest)
        if connect:
            guest.vif.connect(20)
        return guest

    def end(self) -> None:
        for guest in self.guests:
            guest.end()


class Guest:
    """A domain with one vif."""

    def __init__(
        self, net: Net, bridge: str, mac: bytes, *, be: dict[str, Any] | None = None, memory_mib: int = 16,
        **options: Any,
    ) -> None:  # fmt: skip
        self.net, self.mac = net, mac
        self.domain = toolstack.create_domain(net.dom0, memory_mib=memory_mib)
        self.platform = sim.open(net.run_dir, self.domain.domid, self.domain.token)
        text = mac.hex(":")
        self.backend = toolstack.attach(
            net.dom0.store, "vif", self.domain.domid, 0,
            be={"mac": text, "handle": 0, "bridge": bridge, **(be or {})}, fe={"mac": text, "handle": 0},
        )  # fmt: skip
        self.name = f"vif-{self.domain.domid}-0"
        self.vif = Netfront(self.platform, 0, **options)

    def frame(self, to: Guest | bytes, payload: bytes = b"", kind: int = 0x88B5) -> bytes:
        """A frame of an experimental Ethernet type, so that nobody looks into it."""
        dst = to if isinstance(to, bytes) else to.mac
        return dst + self.mac + kind.to_bytes(2, "big") + payload

    def counted(self, kind: str) -> int:
        """A counter of the daemon's, of all queues."""
        found = [d for d in snapshot(self.net.run_dir) if d["device"] == self.name]
        return sum(q["requests"][kind] for d in found for q in d["queues"])

    def said(self) -> str:
        """What the backend has to say of this vif."""
        return (
            self.net.dom0.store.read(f"/local/domain/0/error/backend/vif/{self.domain.domid}/0/error") or b""
        ).decode()

    def end(self) -> None:
        self.vif.close()
        self.platform.close()
        toolstack.clean(self.net.dom0.store, self.domain.domid, self.domain.uuid)


def until(reached: Callable[[], Any], timeout: float = 10.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.01)


@contextlib.contextmanager
def embedded(path: Path) -> Iterator[Path]:
    """An embedded Xen with that run directory."""
    warm()
    with subprocess.Popen([*COMMAND, "sim", "--run-dir", str(path)], stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdout is not None
        assert popen.stdout.readline().startswith("ready")
        yield path
        popen.terminate()
        assert popen.wait(20) == 0


@pytest.fixture(scope="session")
def xen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with embedded(tmp_path_factory.mktemp("xen")) as path:
        yield path


@pytest.fixture(scope="session")
def daemon(xen: Path) -> Iterator[Daemon]:
    daemon = Daemon(xen, xen / "serve.log")
    yield daemon
    daemon.stop()


@contextlib.contextmanager
def network(daemon: Daemon) -> Iterator[Net]:
    """Where guests of a daemon are made; they end with it."""
    dom0 = sim.open(daemon.run_dir)
    net = Net(dom0, daemon.run_dir, daemon)
    try:
        yield net
    finally:
        net.end()
        dom0.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frontend that waits for its grants until they are given back, on a machine with other work."""
    monkeypatch.setattr(front, "GIVE_BACK", 20.0)


@pytest.fixture
def net(xen: Path, daemon: Daemon) -> Iterator[Net]:
    with network(daemon) as net:
        yield net


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with two workers, on a Xen of its own."""
    with embedded(tmp_path_factory.mktemp("workers")) as path:
        daemon = Daemon(path, path / "serve.log", "--workers", "2")
        yield daemon
        daemon.stop()


@pytest.fixture
def several(workers: Daemon) -> Iterator[Net]:
    """Guests of switches of two shards."""
    with network(workers) as net:
        yield net


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Net]:
    """A Xen and a daemon of its own: it is another process in the end."""
    with subprocess.Popen(
        [*COMMAND, "sim", "--run-dir", str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as xen:
        assert xen.stdout is not None and xen.stdout.readline().startswith("ready")
        daemon = Daemon(tmp_path / "run", tmp_path / "log")
        try:
            with network(daemon) as net:
                yield net
        finally:
            for one in daemons.running(tmp_path / "run"):
                subprocess.run(["kill", str(one.pid)], check=False)
            until(lambda: not daemons.running(tmp_path / "run"), 30)
            daemon._ended()
            xen.terminate()
