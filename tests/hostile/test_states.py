"""States in any order, storms of them and of events, and guests that vanish."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pvdrivers.sim import toolstack
from tests.hostile.conftest import Arena
from tests.hostile_frontend import (
    CLOSED,
    CLOSING,
    CONNECTED,
    FLUSH,
    INIT_WAIT,
    INITIALISED,
    INITIALISING,
    READ,
    WRITE,
    Frontend,
    request,
    until,
)


def can_still_connect(front: Frontend) -> None:
    """From wherever it is, in order; a guest that stormed has to wait a little."""
    front.rings.clear()
    front.say(CLOSING)
    front.wait(CLOSING, CLOSED)
    front.say(CLOSED)
    front.wait(CLOSED)
    front.forget_keys()
    front.say(INITIALISING)
    ring = front.connect()
    assert front.ask(ring, request(FLUSH)) == [0]
    front.close()
    front.all_released()


@pytest.mark.parametrize("seed", range(3))
def test_states_in_any_order(quiet: Arena, seed: int) -> None:
    chance = random.Random(seed)
    with quiet.liar() as front:
        ring = front.connect()
        for _ in range(60):
            front.say(chance.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1, "4x", "", b"\xff", "5\n", 1 << 70]))
            if chance.random() < 0.5:
                front.put(ring, request(FLUSH))
            time.sleep(chance.choice([0, 0, 0.005, 0.03]))
        can_still_connect(front)


def test_the_directory_goes_and_comes(quiet: Arena) -> None:
    with quiet.liar() as front:
        front.connect()
        for _ in range(5):
            quiet.bed.dom0.store.rm(front.front)
            time.sleep(0.01)
            quiet.bed.dom0.store.mkdir(front.front)
            quiet.bed.dom0.store.set_perms(front.front, [f"n{front.domid}", "r0"])
            front.say(CONNECTED)
            time.sleep(0.01)
        can_still_connect(front)


def test_reconnect_storm(quiet: Arena) -> None:
    """As fast as it can; the limit slows it down and the others notice nothing."""
    with quiet.liar() as front:
        _, (gref,) = front.page()
        ring = front.connect()
        for i in range(7):
            front.put(ring, *[request(READ, [(gref, 0, 7)], id=k, sector=8 * k) for k in range(16)])
            ring = front.reconnect(abi=(64, 32)[i % 2], order=i % 3, queues=1 + i % 3)
        assert front.ask(ring, request(FLUSH, abi=ring.abi)) == [0]
        front.close()
        front.all_released()


def test_never_answers(quiet: Arena) -> None:
    """Guests that stop at each state; unplugged by force, nothing of theirs is held."""
    for state in (None, INITIALISING, INITIALISED, CONNECTED):
        with quiet.liar(memory_mib=4) as front:
            ring = front.new_ring()
            front.wait(INIT_WAIT)
            if state is not None:
                front.say(state, **front.keys_of([ring]) if state > 2 else {})
            if state in (INITIALISED, CONNECTED):
                front.wait(CONNECTED, CLOSING)
            toolstack.detach(quiet.bed.dom0.store, front.back, timeout=0.5, force=True)
            front.all_released()


def test_storm_of_events_and_of_watches(quiet: Arena) -> None:
    with quiet.liar() as front:
        ring = front.connect()
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            for _ in range(200):
                front.events.notify(ring.port)
            front.say(CONNECTED)
        until(lambda: front.ask(ring, request(FLUSH)) == [0])
        assert quiet.log().count("changes too often") <= 3
        time.sleep(1.2)  # it is looked at again
        can_still_connect(front)


def test_unplugged_in_the_middle(quiet: Arena) -> None:
    for _ in range(3):
        with quiet.liar(memory_mib=4) as front:
            ring = front.connect(queues=2)
            _, (gref,) = front.page()
            front.put(ring, *[request(WRITE, [(gref, 0, 7)], id=i, sector=8 * i) for i in range(32)])
            assert toolstack.detach(quiet.bed.dom0.store, front.back, timeout=0.3, force=True) in (True, False)
            front.all_released()


VANISH = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from pvdrivers.platform import open_platform
from tests.hostile_frontend import *
run_dir, domid, token, step = Path(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3]), sys.argv[4]
front = Frontend.__new__(Frontend)
front.platform = open_platform("sim", run_dir=run_dir, domid=domid, token=token)
front.store, front.events = front.platform.store, front.platform.open_events()
front.domid, front.front = domid, f"/local/domain/{domid}/device/vbd/51712"
front.back, front.dom0 = f"/local/domain/0/backend/vbd/{domid}/51712", SimpleNamespace(store=front.store)
front.error_path = front.back + "/none"
front.rings, front.grefs, front.pages = [], [], []
if step == "keys":
    front.wait(INIT_WAIT)
    front.say(INITIALISED, **front.keys_of([front.new_ring()]))
else:
    ring = front.connect(queues=2)
    _, (gref,) = front.page()
print("there", flush=True)
while step == "io":
    ring.prod = int(ring.words[2]) + 32 & 0xFFFFFFFF
    for i in range(32):
        ring.slot(i)[:] = np.frombuffer(request(WRITE, [(gref, 0, 7)], id=i, sector=8 * i), np.uint8)
    front.push(ring)
time.sleep(60)
"""


@pytest.mark.parametrize("step", ["keys", "idle", "io"])
def test_the_guest_is_killed(quiet: Arena, step: str) -> None:
    """Its process ends without a word; then the toolstack cleans up, and nothing is held."""
    dom0 = quiet.bed.dom0
    domain = toolstack.create_domain(dom0, name="victim", memory_mib=4)
    back = toolstack.attach_vbd(dom0.store, domain.domid, "xvda", quiet.image())
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", VANISH, str(quiet.bed.run_dir), str(domain.domid), domain.token.hex(), step],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"there\n"
        time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    quiet.check()
    toolstack.clean(dom0.store, domain.domid, domain.uuid)

    def gone() -> bool:
        dom0.open_events().close()  # who is dead is buried when somebody joins
        return domain.domid not in {d.domid for d in toolstack.list_domains(dom0.hypercalls)}

    until(gone, what="for the last page of the domain")
    assert dom0.store.read(f"{back}/state") is None
    quiet.check()


def test_closed_under_a_storm_of_events(quiet: Arena) -> None:
    """The poll of an event fd that fires without end is not easy to take away; the ring has to go all the same."""
    with quiet.liar() as front:
        for turn in range(6):
            ring = front.connect() if turn == 0 else front.connect(queues=2)
            ports = [ring.port for ring in front.rings]
            stop = threading.Event()

            def storm(ports: list[int] = ports, stop: threading.Event = stop) -> None:
                while not stop.is_set():
                    for port in ports:
                        front.events.notify(port)

            thread = threading.Thread(target=storm)
            thread.start()
            try:
                assert front.ask(ring, request(FLUSH)) == [0]
                front.close()
            finally:
                stop.set()
                thread.join()
            front.all_released()
            front.rings.clear()
            front.forget_keys()
            front.say(INITIALISING)
