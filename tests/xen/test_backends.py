"""What a frontend that lies is told by each backend of dom0: the kernel's, QEMU's and our own.

The cases are those of tests/hostile, which has many more for ours. Where the others answer otherwise it stands in
DIFFER and in docs/compatibility.md; after what is wrong what is right has to be served, whoever the backend is.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests import request_cases as cases
from tests.hostile_frontend import CLOSING, CONNECTED, FLUSH, INIT_WAIT, INITIALISED, READ, WRITE, request
from tests.request_cases import EOPNOTSUPP, ERROR, OKAY, Guest

from .backends import QEMU_READ_ONLY, Disk, liar
from .system import RESULTS, until

NO_INDIRECT = {
    "nested indirect": ERROR, "indirect flush": ERROR, "indirect without segments": ERROR, "more than offered": ERROR,
    "far more than offered": ERROR, "no indirect page": ERROR, "another's indirect page": ERROR,
}  # fmt: skip
DIFFER: dict[str, dict[str, int]] = {
    "kernel": {"a discard of nothing": ERROR},
    "qemu": {
        "unknown operation": ERROR,
        "reserved operation": ERROR,
        "no segments": OKAY,
        "sign bit": OKAY,
        "wraps in bytes": OKAY,
        **NO_INDIRECT,
    },
    "ours": {},
}
"""Statuses of `each_rule` that are not ours (Linux 6.1, QEMU 7.2)."""
INDIRECT = ("kernel", "ours")
"""Who offers indirect requests."""


def told(name: str, what: str, found: object) -> None:
    """For the results."""
    print(f"{name}: {what}: {found}")
    with (RESULTS / "backends.md").open("a") as out:
        print(f"| {name} | {what} | {found} |", file=out)


@pytest.mark.parametrize("abi", [64, 32])
def test_each_rule_of_a_request(attach: Callable[..., Disk], abi: int) -> None:
    """And ids, operations, pages given twice, indirect pages that lie, in one connection."""
    disk = attach(1)
    with liar(disk) as front:
        guest = Guest(front, abi)
        found, wanted = {}, {}
        for what, (raw, ours) in cases.each_rule(guest).items():
            wanted[what] = DIFFER[disk.name].get(what, ours)
            [found[what]] = guest.ask(raw)
            if found[what] != ours:
                told(disk.name, what, f"{found[what]}, ours {ours}")
        assert found == wanted
        guest.works()

        slots, answers = cases.ids_and_operations(guest)
        front.put(guest.ring, *slots)
        given = sorted(front.answers(guest.ring, len(slots)))
        if disk.name == "qemu":  # what it does not know is an error; indirect requests are among that
            other = {(1 << 63, 199, EOPNOTSUPP): (1 << 63, 199, ERROR), (9, READ, OKAY): (9, 6, ERROR)}
            answers = [other.get(answer, answer) for answer in answers]
        assert given == sorted(answers)
        cases.check_a_page_given_twice(guest, 4)
        if disk.name in INDIRECT:
            cases.check_indirect_pages_that_lie(guest)
        guest.works()
        assert front.backend() == CONNECTED


def test_writes_to_a_disk_that_may_only_be_read(attach: Callable[..., Disk]) -> None:
    disk = attach(1, mode="r")
    if disk.name == "qemu":
        pytest.skip(QEMU_READ_ONLY)
    with liar(disk) as front:
        ring = front.connect()
        data, (gref,) = front.page()
        data[:] = 7
        page = [(gref, 0, 7)]
        assert front.ask(ring, request(WRITE, page), request(READ, page, id=1)) == [ERROR, OKAY]
        assert (data == 0).all()


def test_a_flush_with_data(attach: Callable[..., Disk]) -> None:
    """Nobody sends one; Linux, and we, write the data."""
    disk = attach(1)
    with liar(disk) as front:
        ring = front.connect()
        data, grefs = front.page(2)
        data[:4096] = 7
        assert front.ask(ring, request(FLUSH, [(grefs[0], 0, 7)], sector=80)) == [OKAY]
        assert front.ask(ring, request(READ, [(grefs[1], 0, 7)], sector=80)) == [OKAY]
        written = bool((data[4096:8192] == 7).all())
        told(disk.name, "a flush with data writes them", written)
        assert written


def test_rings_that_are_full_again_and_again(attach: Callable[..., Disk]) -> None:
    disk = attach(1)
    with liar(disk) as front:
        ring = front.connect(order=1)
        for _ in range(8):
            slots = [request(FLUSH, id=i) for i in range(ring.nr_ents)]
            assert front.ask(ring, *slots) == [OKAY] * ring.nr_ents


def test_requests_put_before_it_has_connected(attach: Callable[..., Disk]) -> None:
    disk = attach(1)
    with liar(disk) as front:
        ring = front.new_ring()
        front.wait(INIT_WAIT)
        front.put(ring, *[request(FLUSH, id=i) for i in range(20)])
        front.say(INITIALISED, **front.keys_of([ring]))
        front.wait(CONNECTED)
        front.say(CONNECTED)
        front.events.notify(ring.port)
        assert {status for _, _, status in front.answers(ring, 20)} == {OKAY}


@pytest.mark.parametrize("start", [7, (1 << 32) - 5])
def test_indices_that_do_not_begin_with_zero(attach: Callable[..., Disk], start: int) -> None:
    """As a ring that another backend has served has them."""
    disk = attach(1)
    if disk.name == "qemu":
        pytest.skip("it begins with zero whatever the ring says, and would find requests without end")
    with liar(disk) as front:
        ring = front.connect(start=start)
        assert front.ask(ring, *[request(FLUSH, id=i) for i in range(20)]) == [OKAY] * 20


def test_a_producer_beyond_the_ring(attach: Callable[..., Disk]) -> None:
    """Ours closes; the kernel stops to serve that ring, and stays Connected; QEMU serves the old slots again."""
    disk = attach(1)
    with liar(disk) as front:
        ring = front.connect()
        assert front.ask(ring, *[request(FLUSH, id=i) for i in range(9)]) == [OKAY] * 9
        before = int(ring.words[2])
        front.push(ring, ring.prod + ring.nr_ents + 100)
        if disk.name == "ours":
            front.wait(CLOSING)
            until(front.error, 10, "where Linux puts errors")
            assert "producer index beyond what the ring can hold" in front.error()
            assert int(ring.words[2]) == before
        else:
            time.sleep(3)
            assert front.backend() == CONNECTED
            more = (int(ring.words[2]) - before) & 0xFFFFFFFF
            told(disk.name, "responses to a producer beyond the ring", more)
            assert (more > 0) == (disk.name == "qemu")


def test_slots_that_change_while_they_are_read(attach: Callable[..., Disk]) -> None:
    """Whatever is read once is what counts; statuses may be any of the protocol's, and the ring goes on."""
    disk = attach(1)
    with liar(disk) as front:
        guest = Guest(front, 64)
        ring, chance = guest.ring, random.Random(3)
        page = [(guest.good[0], 0, 7)]
        shapes = [request(READ, page), request(WRITE, page * 11, nr=255), request(READ, [(guest.good[1], 0, 255)]),
                  request(READ, page, sector=1 << 40), request(200, page)]  # fmt: skip
        raws = [np.frombuffer(shape, np.uint8) for shape in shapes]
        for _ in range(30):
            ring.prod = (ring.prod + 16) & 0xFFFFFFFF
            front.push(ring)
            for _ in range(200):
                ring.slot(chance.randrange(ring.nr_ents))[:] = raws[chance.randrange(len(raws))]
            front.answers(ring, 16)
        guest.works()


def test_it_connects_again_and_again(attach: Callable[..., Disk]) -> None:
    """With other layouts and rings each time; all pages are given back."""
    disk = attach(1)
    with liar(disk) as front:
        ring = front.connect()
        for abi, order in ((32, 1), (64, 2), (32, 0)):
            assert front.ask(ring, *[request(FLUSH, id=i, abi=ring.abi) for i in range(9)]) == [OKAY] * 9
            ring = front.reconnect(abi=abi, order=order)
        assert front.ask(ring, request(FLUSH, abi=ring.abi)) == [OKAY]


@pytest.mark.parametrize(
    ("keys", "connects"),
    [
        ({"ring_ref": 31000}, {}),
        ({"protocol": "x86_128-abi"}, {"qemu": 64}),
        ({"event_channel": "none"}, {}),
        ({"protocol": None}, {"kernel": 32, "qemu": 64, "ours": 32}),
    ],
    ids=["ring-ref", "protocol", "event-channel", "no protocol"],
)
def test_keys_that_are_wrong(attach: Callable[..., Disk], keys: dict[str, Any], connects: dict[str, int]) -> None:
    """It is not served; and is, when it says what is right. No protocol at all is x86_32, but to QEMU; and one that
    is none is x86_64 to QEMU as well. `connects`: to whom it is no mistake, and the layout that they take it for."""
    disk = attach(1)
    with liar(disk) as front:
        abi = connects.get(disk.name, 32)
        ring = front.new_ring(abi=abi)
        front.wait(INIT_WAIT)
        said = {key: value for key, value in (front.keys_of([ring]) | keys).items() if value is not None}
        front.say(INITIALISED, **said)
        if disk.name in connects:
            front.wait(CONNECTED)
            front.say(CONNECTED)
            data, grefs = front.page(2)
            data[:4096] = 9
            page = [(grefs[0], 0, 7)], [(grefs[1], 0, 7)]
            assert front.ask(ring, request(WRITE, page[0], abi=abi), request(FLUSH, id=1, abi=abi)) == [OKAY] * 2
            assert front.ask(ring, request(READ, page[1], abi=abi)) == [OKAY]
            assert (data[4096:] == 9).all()
            return
        time.sleep(2)
        state = front.backend()
        told(disk.name, f"state with {keys}", state)
        assert state != CONNECTED
        if disk.name == "ours":
            ring = front.reconnect()
            assert front.ask(ring, request(FLUSH)) == [OKAY]
