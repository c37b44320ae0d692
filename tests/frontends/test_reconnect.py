"""A backend goes and another comes: what was in flight goes out again, and callers notice a delay."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

from pvdrivers.frontends import front
from pvdrivers.frontends.blkfront import Io
from pvdrivers.frontends.load import Load, Plan
from pvdrivers.sim import toolstack
from pvdrivers.xenbus import XenbusState
from tests.hostile_backend import CLOSED, CLOSING, Backend


def _succeed(setup: Any, before: Backend, how: str, **keys: Any) -> Backend:
    """End a backend in one of the ways that there are, and start another with the same data."""
    before.serving = False
    if how == "closes":
        before.say(CLOSING)
        deadline = time.monotonic() + 10
        while before.front_state() not in (6, 1) and time.monotonic() < deadline:
            time.sleep(0.01)
        before.stop()
        before.say(CLOSED)
    elif how == "vanishes":
        before.stop()
        setup.dom0.store.rm(f"{setup.path}/state")
    else:
        before.stop()
    after = setup.serve(len(before.data), **keys)
    after.data = before.data
    return after.start()


@pytest.mark.parametrize("how", ["dies", "closes", "vanishes"])
@pytest.mark.parametrize("persistent", [0, 1])
def test_requests_in_flight_go_out_again(
    setup: Any, monkeypatch: pytest.MonkeyPatch, how: str, persistent: int
) -> None:
    monkeypatch.setattr(front, "DRAIN", 0.3)  # this one never finishes what it has
    backend = setup.serve(feature_persistent=persistent, feature_max_indirect_segments=64)
    disk = setup.connect(queues=2, ring_order=1)
    backend.serving = False
    data = [os.urandom(100 * 1024) for _ in range(8)]
    futures = [disk.submit(Io("write", i * 102400, 102400, data[i])) for i in range(8)]
    time.sleep(0.05)
    # The new one has no indirect requests: what was one becomes several.
    after = _succeed(setup, backend, how, multi_queue_max_queues=1)
    assert [future.result(20) for future in futures] == [102400] * 8
    assert after.data[: 8 * 102400] == b"".join(data)
    assert disk.requeue_count >= 8
    assert disk.connections == 2
    assert disk.read(0, 102400) == data[0]


def test_a_load_goes_on(setup: Any) -> None:
    backend = setup.serve(1 << 20)
    disk = setup.connect()
    load = Load(disk, Plan(depth=16, write_percent=50, verify="all"))
    load.start()
    for _ in range(2):
        time.sleep(0.3)
        before = load.snapshot().requests
        backend = _succeed(setup, backend, "dies")
    time.sleep(0.5)
    load.stop()
    result = load.wait(20)
    assert result.right, str(load)
    assert result.requests > before
    assert result.requeues > 0


def test_unplugged(setup: Any) -> None:
    disk = setup.connect()
    released: list[bool] = []
    thread = threading.Thread(
        target=lambda: released.append(toolstack.detach(setup.dom0.store, setup.path, timeout=10))
    )
    thread.start()
    thread.join(15)
    assert released == [True]
    assert disk.wait_state(lambda: disk.failure, 5)
    assert "detached" in disk.failure
    with pytest.raises(OSError):
        disk.read(0, 512)


def test_removed_between_a_look_and_what_we_say(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toolstack that does not wait for us: what we were about to write may not be written any more."""
    disk = setup.connect()
    say = disk._say

    def too_late(state: XenbusState) -> None:
        setup.dom0.store.rm(disk.path)
        say(state)

    monkeypatch.setattr(disk, "_say", too_late)
    setup.backend.say(CLOSING)
    assert disk.wait_state(lambda: disk.failure, 5)
    assert disk.failure == "disk xvda has been detached"
    with pytest.raises(OSError):
        disk.read(0, 512)


def test_removed_while_it_is_read(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's directory first, as xl does it: keys that are not there any more are no lie of the backend's."""
    disk = setup.connect()
    refresh = disk._refresh

    looked = threading.Event()

    def too_late() -> None:
        setup.dom0.store.rm(setup.path)
        looked.set()
        refresh()

    monkeypatch.setattr(disk, "_refresh", too_late)
    setup.backend.say(int(XenbusState.Connected))
    assert looked.wait(5)
    assert not disk.wait_state(lambda: disk.failure, 0.3)
    setup.dom0.store.rm(disk.path)
    assert disk.wait_state(lambda: disk.failure, 5)
    assert disk.failure == "disk xvda has been detached"


def test_a_disk_that_nobody_serves(setup: Any) -> None:
    from pvdrivers.errors import PvError
    from pvdrivers.frontends.blkfront import Blkfront

    disk = Blkfront(setup.guest, 202 << 8)
    with pytest.raises(PvError, match="Is a backend running"):
        disk.connect(0.2)
    assert disk.state is XenbusState.Initialising
    disk.close()
