"""Any bytes in any slot, and grants that are not what they seem: a status each, and the next request is served."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from tests.hostile.conftest import Arena
from tests.hostile_frontend import (
    BARRIER,
    DISCARD,
    FLUSH,
    INDIRECT,
    READ,
    WRITE,
    Frontend,
    discard,
    indirect,
    pack_segments,
    request,
)
from tests.request_cases import (
    EOPNOTSUPP,
    ERROR,
    OKAY,
    SECTORS,
    Guest,
    check_a_page_given_twice,
    check_indirect_pages_that_lie,
    each_rule,
    ids_and_operations,
)

POLICIES = ["map", "persistent", "copy"]


@pytest.fixture(params=[(abi, policy) for policy in POLICIES for abi in (64, 32)], ids=lambda p: f"{p[0]}-{p[1]}")
def guest(arena: Arena, request: pytest.FixtureRequest) -> Iterator[Guest]:
    abi, policy = request.param
    with arena.liar(f"{arena.image()},policy={policy}") as front:
        guest = Guest(front, abi, persistent=int(policy == "persistent"))
        yield guest
        guest.works()
        front.close()
        front.all_released()


def test_each_rule_of_a_request(guest: Guest) -> None:
    """One wrong thing at a time; every answer with its id, its operation and the status that Linux gives."""
    for name, (raw, status) in each_rule(guest).items():
        assert guest.ask(raw) == [status], name


def test_ids_and_operations_come_back_as_they_went(guest: Guest) -> None:
    slots, answers = ids_and_operations(guest)
    guest.front.put(guest.ring, *slots)
    assert sorted(guest.front.answers(guest.ring, len(slots))) == sorted(answers)


def test_a_page_given_twice(guest: Guest) -> None:
    check_a_page_given_twice(guest, 20)


def test_indirect_pages_that_lie(guest: Guest) -> None:
    check_indirect_pages_that_lie(guest)


def test_revoked_under_way(guest: Guest) -> None:
    """Grants end and come back, writable and not, while requests name them."""
    front, abi = guest.front, guest.abi
    _, frames = front.alloc(4)
    offered = list(front.platform.pages.reserve(4))
    seam = front.platform.seam(front.events)[0]
    from pvdrivers.sim.pages import _offer_end, _offer_grant

    stop = threading.Event()
    chance = random.Random(2)

    def revoke() -> None:
        while not stop.is_set():
            k = chance.randrange(4)
            _offer_end(int(seam["offer_ctx"]), offered[k], 0, 0)
            _offer_grant(int(seam["offer_ctx"]), offered[k], frames[k], (chance.randrange(8) // 7) << 16)

    thread = threading.Thread(target=revoke)
    thread.start()
    try:
        for round in range(60):
            ops = [chance.choice([READ, WRITE]) for _ in range(16)]
            slots = [request(op, [(offered[j], 0, 7) for j in chance.sample(range(4), 3)], id=i, sector=i * 24, abi=abi)
                     for i, op in enumerate(ops)]  # fmt: skip
            assert set(guest.ask(*slots)) <= {OKAY, ERROR}, round
    finally:
        stop.set()
        thread.join()
    front.grefs += offered


def test_slots_changed_while_they_are_read(guest: Guest) -> None:
    """A thread writes over the slots and the indirect pages without end; whatever is read once is what counts."""
    abi, ring = guest.abi, guest.ring
    chance = random.Random(3)
    page = [(guest.good[0], 0, 7)]
    shapes = [request(READ, page, abi=abi), request(WRITE, page * 11, nr=255, abi=abi),
              indirect(READ, guest.table_grefs, 200, abi=abi), indirect(WRITE, guest.table_grefs, 65535, abi=abi),
              request(READ, [(guest.good[1], 0, 255)], sector=1 << 63, abi=abi), discard(0, 8, abi=abi)]  # fmt: skip
    raws = [np.frombuffer(s, np.uint8) for s in shapes]
    tables = [np.frombuffer(pack_segments([(g, f, last)] * 512), np.uint8)
              for g in (guest.good[2], 0xFFFFFFFF) for f, last in ((0, 7), (7, 255), (200, 3))]  # fmt: skip
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            ring.slot(chance.randrange(ring.nr_ents))[:] = raws[chance.randrange(len(raws))]
            guest.table[:4096] = tables[chance.randrange(len(tables))]

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        for _ in range(60):
            ring.prod = (ring.prod + 16) & 0xFFFFFFFF
            guest.front.push(ring)
            guest.front.answers(ring, 16)
            time.sleep(0.0005)
    finally:
        stop.set()
        thread.join()


# Random batches

near = st.sampled_from([0, 1, 7, 8, 11, 12, 255])
sectors = st.one_of(st.integers(0, SECTORS + 8), st.sampled_from([(1 << 64) - 1, 1 << 63, (1 << 63) - 1, 1 << 55]))
operations = st.one_of(st.sampled_from([READ, WRITE, BARRIER, FLUSH, DISCARD, INDIRECT]), st.integers(0, 255))
segment = st.tuples(st.integers(0, 20), st.one_of(st.integers(0, 8), near), st.one_of(st.integers(0, 8), near))
direct = st.tuples(st.just("direct"), operations, st.lists(segment, max_size=11), near, sectors)
through = st.tuples(st.just("indirect"), st.one_of(st.sampled_from([READ, WRITE]), operations),
                    st.lists(st.integers(0, 20), max_size=8), st.one_of(st.integers(0, 300), st.just(65535)),
                    sectors)  # fmt: skip
holes = st.tuples(st.just("discard"), sectors, sectors, st.integers(0, 255))
noise = st.tuples(st.just("noise"), st.binary(min_size=112, max_size=112))
batches = st.lists(st.one_of(direct, through, holes, noise), min_size=1, max_size=32)
tables = st.lists(segment, max_size=40)


def raw(guest: Guest, drawn: tuple, id: int) -> bytes:  # type: ignore[type-arg]
    def gref(i: int) -> int:
        return guest.grefs[i % len(guest.grefs)]

    kind, *rest = drawn
    if kind == "direct":
        op, segments, nr, sector = rest
        named = [(gref(g), a, b) for g, a, b in segments]
        return request(op, named, id=id, sector=sector, nr=len(named) if nr % 2 else nr, abi=guest.abi)
    if kind == "indirect":
        op, grefs, nr, sector = rest
        return indirect(op, [gref(g) for g in grefs], nr, id=id, sector=sector, abi=guest.abi)
    if kind == "discard":
        return discard(rest[0], rest[1], flag=rest[2], id=id, abi=guest.abi)
    return bytes(rest[0])


@pytest.fixture(scope="package")
def victims(arena: Arena) -> Iterator[dict[tuple[int, str], Guest]]:
    """Connected once: the batches follow upon each other, as they would come from a guest."""
    found: dict[tuple[int, str], Guest] = {}
    fronts = []
    for policy in POLICIES:
        for abi in (64, 32):
            front = Frontend(arena.bed.run_dir, arena.bed.dom0, f"{arena.image()},policy={policy},secure_discard=on")
            fronts.append(front)
            found[abi, policy] = Guest(front, abi, persistent=int(policy == "persistent"))
    yield found
    for front in fronts:
        front.destroy()


@given(st.sampled_from(POLICIES), st.sampled_from([64, 32]), batches, tables)
def test_any_batch_is_answered(
    arena: Arena, victims: dict[tuple[int, str], Guest], policy: str, abi: int, batch: list, table: list  # type: ignore[type-arg]
) -> None:
    """Every slot has one response, with a status of the protocol, and what comes next is served right."""
    guest = victims[abi, policy]
    segments = pack_segments([(guest.grefs[g % len(guest.grefs)], a, b) for g, a, b in table])
    guest.table[: len(segments)] = np.frombuffer(segments, np.uint8)
    # What reads over the ring's own page would garble the answers, and nobody but the guest is harmed: leave it out.
    ring_page = guest.ring.grefs[0]
    slots = [raw(guest, drawn, i) for i, drawn in enumerate(batch)]
    if ring_page.to_bytes(4, "little") in b"".join([*slots, segments]):
        slots = [request(FLUSH, abi=abi, id=i) for i in range(len(slots))]
    note(f"{len(slots)} slots")
    guest.front.put(guest.ring, *slots)
    answers = guest.front.answers(guest.ring, len(slots))
    assert {status for _, _, status in answers} <= {OKAY, ERROR, EOPNOTSUPP}
    guest.table[:] = 0
    guest.works()
    assert arena.backend.popen.poll() is None
