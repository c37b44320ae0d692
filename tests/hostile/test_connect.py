"""Keys that are missing, absurd, or change during connect; grants and ports that cannot be used."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from tests.hostile.conftest import Arena
from tests.hostile_frontend import (
    CLOSED,
    CLOSING,
    CONNECTED,
    FLUSH,
    INIT_WAIT,
    INITIALISED,
    Frontend,
    request,
    until,
)

ABSURD: dict[str, dict[str, Any]] = {
    "ring-ref 0": {"ring_ref": 0},
    "ring-ref -1": {"ring_ref": -1},
    "ring-ref 2**32": {"ring_ref": 1 << 32},
    "ring-ref text": {"ring_ref": "eight"},
    "ring-ref empty": {"ring_ref": ""},
    "ring-ref hexadecimal": {"ring_ref": "0x8"},
    "ring-ref bytes": {"ring_ref": b"\xff\xfe\0\x01"},
    "ring-ref long": {"ring_ref": "9" * 1000},
    "event-channel 0": {"event_channel": 0},
    "event-channel 2**64": {"event_channel": 1 << 64},
    "num-queues 0": {"multi_queue_num_queues": 0},
    "num-queues 10000": {"multi_queue_num_queues": 10000},
    "queues without keys": {"multi_queue_num_queues": 2},
    "order 99": {"ring_page_order": 99},
    "order -1": {"ring_page_order": -1},
    "order without refs": {"ring_page_order": 2},
    "protocol nonsense": {"protocol": "x86_128-abi"},
    "protocol long": {"protocol": "x" * 200},
    "protocol bytes": {"protocol": b"\x80\x81"},
    "persistent text": {"feature_persistent": "yes please"},
    "a huge value": {"whatever": "x" * 2000},
}


def refused(arena: Arena, front: Frontend, *words: str) -> None:
    """Closing, and log and store name domain, device and what was wrong, once."""
    front.wait(CLOSING)
    until(front.error, what="for the error node")
    name = f"domain {front.domid}, device vbd-{front.domid}-51712: "
    assert name in front.error()
    for word in words:
        assert word in front.error()
    assert arena.log().count(name) == 1


@pytest.mark.parametrize("keys", ABSURD.values(), ids=ABSURD)
def test_absurd_keys(quiet: Arena, keys: dict[str, Any]) -> None:
    with quiet.liar(memory_mib=4) as front:
        ring = front.new_ring()
        front.wait(INIT_WAIT)
        front.say(INITIALISED, **front.keys_of([ring]) | keys)
        name = next(iter(keys)).replace("_", "-")
        refused(quiet, front, *[] if "queues" in name or "order" in name or "proto" in name else [name])
        front.all_released()


@pytest.mark.parametrize("missing", ["ring-ref", "event-channel"])
def test_missing_keys(quiet: Arena, missing: str) -> None:
    with quiet.liar(memory_mib=4) as front:
        keys = front.keys_of([front.new_ring()])
        del keys[missing.replace("-", "_")]
        front.wait(INIT_WAIT)
        front.say(INITIALISED, **keys)
        refused(quiet, front, missing, "missing")


@pytest.mark.parametrize("twice", ["ring_ref", "event_channel"])
def test_two_queues_that_are_one(quiet: Arena, twice: str) -> None:
    with quiet.liar(memory_mib=4) as front:
        keys = front.keys_of([front.new_ring(), front.new_ring()])
        keys[f"queue_1__{twice}"] = keys[f"queue_0__{twice}"]
        front.wait(INIT_WAIT)
        front.say(INITIALISED, **keys)
        refused(quiet, front, "two queues name the same page or the same event channel")


def test_pages_and_ports_that_are_not_theirs_to_give(quiet: Arena) -> None:
    """Rings that cannot be mapped and ports that cannot be bound: told once, and right as soon as they are right."""
    with quiet.liar(memory_mib=4) as front, quiet.liar(memory_mib=4) as other:
        good = front.new_ring()
        readonly = front.new_ring(readonly=True).grefs[0]
        others = front.page(domid=other.domid)[1][0]
        foreign_port = other.events.alloc_unbound(0)
        for_another = front.events.alloc_unbound(other.domid)
        front.wait(INIT_WAIT)
        for wrong in ({"ring_ref": readonly}, {"ring_ref": others}, {"ring_ref": 31000}, {"ring_ref": 0xFFFFFFFF},
                      {"event_channel": 0xFFFFFFFF}, {"event_channel": for_another},
                      {"event_channel": foreign_port + 1000}):  # fmt: skip
            quiet.log()
            front.say(INITIALISED, **front.keys_of([good]) | wrong)
            until(front.error, what=f"for an error of {wrong}")
            assert front.backend() in (INIT_WAIT, CLOSING)
            assert quiet.log().count(f"vbd-{front.domid}-51712: ") >= 1
            front.say(CLOSING)
            front.wait(CLOSING, CLOSED)
            front.say(CLOSED)
            front.wait(CLOSED)
            front.say(1)
            front.wait(INIT_WAIT)
            until(lambda: not front.error(), what="for the error to be over")
        front.rings.remove(front.rings[1])
        front.say(INITIALISED, **front.keys_of([good]))
        front.wait(CONNECTED)
        assert front.ask(good, request(FLUSH)) == [0]


def test_a_huge_directory(quiet: Arena) -> None:
    """As many nodes as the guest's quota lets it have, deep and wide."""
    with quiet.liar(memory_mib=4) as front:
        front.wait(INIT_WAIT)
        front.write(**front.keys_of([front.new_ring()]))
        made = 0
        try:
            for made in range(3000):
                front.store.write(f"{front.front}/queue-{made % 40}/x{made}", "x" * 250)
        except OSError:
            pass
        assert made > 500
        began = time.monotonic()
        front.say(INITIALISED)
        front.wait(CONNECTED, CLOSING)
        assert time.monotonic() - began < 10


def test_keys_that_change_all_the_time_hold_up_nobody_else(quiet: Arena) -> None:
    """One guest rewrites its directory without end while it connects; another connects meanwhile."""
    with quiet.liar(memory_mib=4) as front:
        chance = random.Random(5)
        ring = front.new_ring()
        front.wait(INIT_WAIT)
        keys = front.keys_of([ring])
        stop = threading.Event()

        def rewrite() -> None:
            while not stop.is_set():
                name = chance.choice(["ring-ref", "event-channel", "protocol", "ring-page-order", "junk"])
                front.store.write(f"{front.front}/{name}", chance.choice(["1", "x", "4096", str(ring.grefs[0])]))

        thread = threading.Thread(target=rewrite)
        thread.start()
        try:
            front.say(INITIALISED, **keys)
            slowest = 0.0
            for _ in range(3):
                began = time.monotonic()
                with quiet.liar(memory_mib=4) as other:
                    assert other.ask(other.connect(), request(FLUSH)) == [0]
                    slowest = max(slowest, time.monotonic() - began)
                front.say(chance.choice([INITIALISED, CONNECTED]))
        finally:
            stop.set()
            thread.join()
        assert slowest < 15, f"{slowest:.1f} s to connect beside a guest that rewrites its keys"


def test_indices_of_slots_put_before_connect(quiet: Arena) -> None:
    """A frontend may put requests before it is connected; they are served, however the indices begin."""
    for start in (0, 7, (1 << 32) - 3):
        with quiet.liar(memory_mib=4) as front:
            ring = front.new_ring(start=start)
            front.wait(INIT_WAIT)
            front.put(ring, *[request(FLUSH, id=i) for i in range(20)])
            front.say(INITIALISED, **front.keys_of([ring]))
            assert len(front.answers(ring, 20)) == 20
