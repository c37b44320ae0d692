"""The service manager is told the truth: readiness, status, reloading, stopping, and signs of life only while alive."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pvdrivers import notify
from pvdrivers.notify import Notifier
from pvdrivers.sim import toolstack
from tests.restart.bed import Bed
from tests.service.manager import Manager

PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH, WALL = 0x4206, 0x4207, 17, 0x40000000


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@pvdrivers-test-{os.getpid()}"
    with Manager(address) as found:
        yield found


def test_messages(manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    notifier.ready("serving")
    notifier.reloading()
    notifier.main_pid(7)
    notifier.stopping()
    notifier.alive()
    manager.until(lambda m: "WATCHDOG" in m)
    found = [fields for _, fields in manager.messages]
    assert found[0] == {"READY": "1", "STATUS": "serving"}
    assert found[1]["RELOADING"] == "1" and abs(int(found[1]["MONOTONIC_USEC"]) / 1e6 - time.monotonic()) < 5
    assert found[2:] == [{"MAINPID": "7"}, {"STOPPING": "1", "STATUS": "handing over"}, {"WATCHDOG": "1"}]


def test_patience_while_something_takes_long(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_EXTEND_EVERY", 0.05)
    with Notifier({"NOTIFY_SOCKET": manager.address}).patience("compiling"):
        manager.take(0.3)
        manager.until(lambda m: len(manager.messages) >= 3)
    assert manager.messages[0][1] == {"EXTEND_TIMEOUT_USEC": "30000000", "STATUS": "compiling"}
    manager.forget()
    manager.take(0.2)
    assert manager.messages == []


def test_patience_has_an_end(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_EXTEND_EVERY", 0.01)
    monkeypatch.setattr(notify, "_EXTEND_AT_MOST", 0.1)
    with Notifier({"NOTIFY_SOCKET": manager.address}).patience("compiling"):
        manager.take(0.3)
        manager.forget()
        manager.take(0.2)
        assert manager.messages == [], "a hang is not excused for ever"


@pytest.mark.parametrize("address", ["", "/does/not/exist", "relative", "@nobody-listens"])
def test_without_a_manager_nothing_happens(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address} if address else {})
    notifier.ready("x")
    with notifier.patience("x"):
        pass


@pytest.mark.parametrize(("environ", "seconds"), [
    ({"WATCHDOG_USEC": "3000000"}, 3.0),
    ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
    ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
    ({"WATCHDOG_USEC": "0"}, None),
    ({"WATCHDOG_USEC": "soon"}, None),
    ({}, None),
])  # fmt: skip
def test_whether_a_watchdog_waits(environ: dict[str, str], seconds: float | None) -> None:
    assert Notifier({"NOTIFY_SOCKET": "@x", **environ}).watchdog_seconds == seconds
    assert Notifier(environ).watchdog_seconds is None, "nobody to tell"


# A daemon


def test_a_daemon_from_start_to_end(bed: Callable[..., Bed], tmp_path: Path) -> None:
    with Manager(str(tmp_path / "notify")) as manager:
        b = bed()
        daemon = b.serve(NOTIFY_SOCKET=manager.address)
        assert manager.until(lambda m: "EXTEND_TIMEOUT_USEC" in m)["STATUS"] == "compiling"
        assert manager.until(lambda m: m.get("READY") == "1")["STATUS"] == "serving"
        assert manager.until(lambda m: "MAINPID" in m) == {"MAINPID": str(daemon.popen.pid)}
        domain = toolstack.create_domain(b.dom0, memory_mib=4)
        toolstack.attach_vbd(b.dom0.store, domain.domid, "xvda", "memory:1M")
        manager.until(lambda m: m.get("STATUS") == "1 device, 0 connected")
        toolstack.attach_vbd(b.dom0.store, domain.domid, "xvdb", "/does/not/exist")
        manager.until(lambda m: "2 devices, 0 connected, 1 with trouble" in m.get("STATUS", ""))
        manager.forget()
        daemon.popen.send_signal(signal.SIGHUP)
        manager.until(lambda m: "RELOADING" in m)
        manager.until(lambda m: m.get("READY") == "1")
        manager.take(1.0)
        assert manager.heard("WATCHDOG") == [], "nobody asked for it"
        manager.forget()
        assert daemon.end() == 0
        manager.until(lambda m: m.get("STOPPING") == "1")


@contextmanager
def stopped(tids: list[int]) -> Iterator[None]:
    """These threads of another process do not run meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    for tid in tids:
        if libc.ptrace(PTRACE_SEIZE, tid, None, None) != 0:
            pytest.skip(f"no ptrace here: {os.strerror(ctypes.get_errno())}")
        assert libc.ptrace(PTRACE_INTERRUPT, tid, None, None) == 0
        os.waitpid(tid, WALL)
    try:
        yield
    finally:
        for tid in tids:
            assert libc.ptrace(PTRACE_DETACH, tid, None, None) == 0


def threads(pid: int) -> list[int]:
    """All but the control thread."""
    return [int(name) for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid]


NO_ANSWER = "a worker does not answer"


def test_signs_of_life_are_signs_of_life(bed: Callable[..., Bed], tmp_path: Path) -> None:
    """Given while the control thread turns and every worker goes round its loop; and not otherwise."""
    period = 2.0
    with Manager(str(tmp_path / "notify")) as manager:
        b = bed("--workers", "2")
        daemon = b.serve(NOTIFY_SOCKET=manager.address, WATCHDOG_USEC=str(int(period * 1e6)))
        pid = daemon.popen.pid
        manager.until(lambda m: "READY" in m)
        assert manager.gives_signs(period), "in none of three stretches"
        said = b.log.read_text().count(NO_ANSWER)

        with stopped(threads(pid)):  # the workers hang; the control thread does not
            manager.take(period)
            manager.forget()
            manager.take(3 * period)
            assert manager.heard("WATCHDOG") == []
            # The control thread is as it was.
            toolstack.create_domain(b.dom0, memory_mib=4)
            daemon.popen.send_signal(signal.SIGHUP)
            manager.until(lambda m: "RELOADING" in m, timeout=5)
        manager.until(lambda m: "WATCHDOG" in m, timeout=5)
        assert b.log.read_text().count(NO_ANSWER) == said + 1

        os.kill(pid, signal.SIGSTOP)
        try:
            manager.take(period)
            manager.forget()
            manager.take(3 * period)
            assert manager.messages == []
        finally:
            os.kill(pid, signal.SIGCONT)
        manager.until(lambda m: "WATCHDOG" in m, timeout=5)
        assert daemon.end() == 0


@pytest.mark.slow
def test_a_first_start_is_waited_for(bed: Callable[..., Bed], tmp_path: Path) -> None:
    """With nothing compiled: the manager hears every few seconds that it goes on."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    with Manager(str(tmp_path / "notify")) as manager:
        b = bed()
        b.serve(NOTIFY_SOCKET=manager.address, PVDRIVERS_CACHE_DIR=str(cache))
        manager.until(lambda m: "READY" in m)
        asked = manager.heard("EXTEND_TIMEOUT_USEC")
        assert len(asked) >= 2
        manager.take(0.5)
        assert manager.heard("EXTEND_TIMEOUT_USEC") == asked
