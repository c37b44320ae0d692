"""Daemons whose control threads run, with workers that do nothing, on a real store with guests."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from pvdrivers import toolstack
from pvdrivers.device import Context, DeviceId
from pvdrivers.errors import PlatformError
from pvdrivers.host import Host
from pvdrivers.platform import Platform
from pvdrivers.xenbus import XenbusState as S
from pvdrivers.xenstore import XenStoreClient
from tests.device.bed import Disk, Guest
from tests.xenstore.conftest import Served


class Pool:
    """Workers that do nothing but report what the test tells them."""

    def __init__(self) -> None:
        self.alert_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.found: list[tuple[Any, str]] = []
        self.said: list[tuple[Any, str, str, int]] = []
        self.failed = ""

    def start(self) -> None: ...

    def stop(self) -> None:
        os.close(self.alert_fd)

    def alerts(self) -> list[tuple[Any, str]]:
        os.eventfd_read(self.alert_fd)
        if self.failed:
            raise PlatformError(self.failed)
        found, self.found = self.found, []
        return found

    def notices(self) -> list[tuple[Any, str, str, int]]:
        said, self.said = self.said, []
        return said

    def report(self, device: Any, violation: str) -> None:
        self.found.append((device, violation))
        os.eventfd_write(self.alert_fd, 1)


class Daemon:
    """A host in a thread."""

    def __init__(self, run_dir: Path, connect: Callable[[], XenStoreClient], *, domid: int = 0, kind: str = "vbd",
                 **options: Any) -> None:  # fmt: skip
        self.disks: dict[str, Disk] = {}
        self.stuck: dict[str, threading.Event] = {}
        self.pool = Pool()
        platform = SimpleNamespace(domid=domid, store=connect())
        self.platform = platform
        context = Context(cast(Platform, platform), self.pool, run_dir)
        self.host = Host(context, {kind: self._make}, connect_store=connect, **options)  # type: ignore[dict-item]
        self.ready = threading.Event()
        self.found = -1
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _make(self, ident: DeviceId, context: Context) -> Disk:
        disk = self.disks[str(ident)] = Disk(ident, context)

        def hold(what: str) -> None:
            if str(ident) in self.stuck:
                self.stuck[str(ident)].wait(20)

        disk.hold = hold
        return disk

    def _run(self) -> None:
        try:
            self.host.run(self._is_ready)
        except BaseException as e:
            self.error = e
        self.ready.set()

    def _is_ready(self, found: int) -> None:
        self.found = found
        self.ready.set()

    def stop(self) -> None:
        self.host.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.host.close()
        self.platform.store.close()
        self.pool.stop()


class Yard:
    """A store, guests, and daemons that are stopped at the end."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.run_dir = directory
        self.served = Served(directory / "xenstored")
        stack.callback(self.served.close)
        self.stack = stack
        self.dom0 = self.served.client()
        stack.callback(self.dom0.close)

    def daemon(self, **options: Any) -> Daemon:
        connect = options.pop("connect", self.served.client)
        daemon = Daemon(self.run_dir, connect, **options)
        self.stack.callback(daemon.stop)
        assert daemon.ready.wait(10)
        return daemon

    def guest(self, domid: int, devid: int = 51712) -> Guest:
        client = self.served.guest(domid)
        self.stack.callback(client.close)
        return Guest(self.dom0, client, domid, devid)


class DriverDomain:
    """The store as domain 3 has it, with a guest's disk attached by dom0."""

    def __init__(self, yard: Yard) -> None:
        self.yard = yard
        home = "/local/domain/3"
        yard.dom0.mkdir(home)
        yard.dom0.set_perms(home, ["n0", "r3"])
        for name in ("error", "data"):
            yard.dom0.mkdir(f"{home}/{name}")
            yard.dom0.set_perms(f"{home}/{name}", ["n3"])
        yard.dom0.mkdir("/local/domain/5")
        yard.dom0.set_perms("/local/domain/5", ["n0", "r5"])
        self.store = yard.served.guest(5)
        yard.stack.callback(self.store.close)
        self.front = "/local/domain/5/device/vbd/51712"
        self.attach(51712)

    def attach(self, devid: int) -> str:
        self.back = toolstack.attach(self.yard.dom0, "vbd", 5, devid, backend_domid=3)
        return self.back

    def state(self) -> S:
        return toolstack.backend_state(self.yard.dom0, self.back)

    def connect(self) -> XenStoreClient:
        """As the daemon in domain 3 would."""
        return self.yard.served.guest(3)

    def publish(self) -> None:
        for key, value in (("ring-ref", 8), ("event-channel", 9), ("state", 3)):
            self.store.write(f"{self.front}/{key}", value)


def until(what: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def connect(guest: Guest) -> None:
    guest.attach()
    until(lambda: guest.state() == S.InitWait)
    guest.publish()
    until(lambda: guest.state() == S.Connected)
    guest.say(S.Connected)


def break_connection(daemon: Daemon) -> None:
    with socket.socket(fileno=os.dup(daemon.platform.store._fd)) as theirs:
        theirs.shutdown(socket.SHUT_RDWR)


@contextmanager
def no_store(daemon: Daemon) -> Iterator[None]:
    """A daemon whose connection is broken while the block runs, and cannot be made anew."""
    away, real = threading.Event(), daemon.host._connect_store
    assert real is not None

    def comes_late() -> XenStoreClient:
        if not away.is_set():
            raise ConnectionRefusedError(errno.ECONNREFUSED, "away")
        return cast(XenStoreClient, real())

    daemon.host._connect_store = comes_late
    break_connection(daemon)
    until(lambda: daemon.host._store_fd == -1)
    yield
    away.set()
