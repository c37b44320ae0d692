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
    RESERVED,
    WRITE,
    Frontend,
    Ring,
    discard,
    indirect,
    pack_segments,
    request,
)

SECTORS = (1 << 20) // 512
OKAY, ERROR, EOPNOTSUPP = 0, -1, -2
POLICIES = ["map", "persistent", "copy"]


class Guest:
    """A connected liar with some pages of every kind."""

    def __init__(self, front: Frontend, abi: int, *, persistent: int = 0, order: int = 0) -> None:
        self.front, self.abi = front, abi
        self.ring: Ring = front.connect(abi=abi, order=order, feature_persistent=persistent)
        self.data, grefs = front.page(4)
        self.good = grefs
        self.readonly = front.page(readonly=True)[1][0]
        self.others = front.page(domid=1)[1][0]
        self.table, self.table_grefs = front.page(2)
        self.ended = front.page()[1][0]  # last, or somebody else would get the number
        assert front.platform.pages.end(self.ended)
        front.grefs.remove(self.ended)
        self.grefs = [*grefs, self.readonly, self.others, self.ended, self.ring.grefs[0], *self.table_grefs, 0,
                      1 << 20, 0xFFFFFFFF]  # fmt: skip

    def ask(self, *slots: bytes) -> list[int]:
        return self.front.ask(self.ring, *slots)

    def works(self) -> None:
        """A page written and read back."""
        self.data[:4096] = np.frombuffer(random.randbytes(4096), np.uint8)
        wrote = self.data[:4096].copy()
        assert self.ask(request(WRITE, [(self.good[0], 0, 7)], abi=self.abi)) == [OKAY]
        self.data[:4096] = 0
        assert self.ask(request(READ, [(self.good[0], 0, 7)], abi=self.abi)) == [OKAY]
        assert (self.data[:4096] == wrote).all()


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
    abi, good = guest.abi, guest.good
    page = [(good[0], 0, 7)]
    wrong = {
        "unknown operation": (request(200, page, abi=abi), EOPNOTSUPP),
        "reserved operation": (request(RESERVED, page, abi=abi), EOPNOTSUPP),
        "no segments": (request(READ, abi=abi), ERROR),
        "twelve segments": (request(READ, page * 11, nr=12, abi=abi), ERROR),
        "255 segments": (request(WRITE, page * 11, nr=255, abi=abi), ERROR),
        "last before first": (request(READ, [(good[0], 5, 2)], abi=abi), ERROR),
        "beyond the page": (request(READ, [(good[0], 0, 8)], abi=abi), ERROR),
        "far beyond the page": (request(WRITE, [(good[0], 255, 255)], abi=abi), ERROR),
        "past the end": (request(READ, page, sector=SECTORS - 7, abi=abi), ERROR),
        "at the end": (request(READ, page, sector=SECTORS, abi=abi), ERROR),
        "wrapping": (request(READ, page, sector=(1 << 64) - 4, abi=abi), ERROR),
        "sign bit": (request(WRITE, page, sector=1 << 63, abi=abi), ERROR),
        "wraps in bytes": (request(WRITE, page, sector=1 << 55, abi=abi), ERROR),
        "no such grant": (request(READ, [(1 << 20, 0, 7)], abi=abi), ERROR),
        "grant 2**32 - 1": (request(WRITE, [(0xFFFFFFFF, 0, 7)], abi=abi), ERROR),
        "another domain's": (request(READ, [(guest.others, 0, 7)], abi=abi), ERROR),
        "an ended grant": (request(READ, [(guest.ended, 0, 7)], abi=abi), ERROR),
        "into a read-only page": (request(READ, [(guest.readonly, 0, 7)], abi=abi), ERROR),
        "one bad among good": (request(READ, [*page * 5, (guest.others, 0, 7), *page], abi=abi), ERROR),
        "discard past the end": (discard(SECTORS - 1, 2, abi=abi), ERROR),
        "discard that wraps": (discard(1, (1 << 64) - 1, abi=abi), ERROR),
        "nested indirect": (indirect(INDIRECT, guest.table_grefs, 1, abi=abi), ERROR),
        "indirect flush": (indirect(FLUSH, guest.table_grefs, 1, abi=abi), ERROR),
        "indirect without segments": (indirect(READ, guest.table_grefs, 0, abi=abi), ERROR),
        "more than offered": (indirect(READ, guest.table_grefs, 257, abi=abi), ERROR),
        "far more than offered": (indirect(WRITE, guest.table_grefs, 65535, abi=abi), ERROR),
        "no indirect page": (indirect(WRITE, [0xFFFFFFFF], 16, abi=abi), ERROR),
        "another's indirect page": (indirect(READ, [guest.others], 16, abi=abi), ERROR),
    }
    for name, (raw, status) in wrong.items():
        assert guest.ask(raw) == [status], name
    assert guest.ask(request(FLUSH, abi=abi, sector=(1 << 64) - 1)) == [OKAY], "a bare flush carries anything there"
    assert guest.ask(discard(0, 0, abi=abi)) == [OKAY]


def test_ids_and_operations_come_back_as_they_went(guest: Guest) -> None:
    page = [(guest.good[0], 0, 7)]
    guest.table[:8] = np.frombuffer(pack_segments(page), np.uint8)
    abi = guest.abi
    slots = [request(READ, page, id=(1 << 64) - 1, abi=abi), request(READ, page, id=7, abi=abi),
             request(READ, page, id=7, abi=abi), request(199, page, id=1 << 63, abi=abi),
             indirect(READ, guest.table_grefs, 1, id=9, abi=abi), discard(0, 8, id=0, abi=abi)]  # fmt: skip
    guest.front.put(guest.ring, *slots)
    assert sorted(guest.front.answers(guest.ring, len(slots))) == sorted([
        ((1 << 64) - 1, READ, OKAY), (7, READ, OKAY), (7, READ, OKAY), (1 << 63, 199, EOPNOTSUPP), (9, READ, OKAY),
        (0, DISCARD, OKAY)])  # fmt: skip


def test_a_page_given_twice(guest: Guest) -> None:
    """One gref in many segments and requests at once; one frame behind several grefs; the ring's own page as data."""
    front, abi = guest.front, guest.abi
    frame = front.pages[1].frames[0]
    twin = front.grant(frame)
    mixed = [(guest.good[0], 0, 0), (twin, 0, 0), (guest.good[0], 1, 1)] * 3
    for _ in range(20):
        slots = [request(op, mixed, id=i, sector=i * 16, abi=abi) for i, op in enumerate([WRITE, READ] * 8)]
        assert guest.ask(*slots) == [OKAY] * 16
    ring_page = guest.ring.grefs[0]
    assert guest.ask(*[request(WRITE, [(ring_page, 0, 7)], id=i, abi=abi) for i in range(4)]) == [OKAY] * 4
    assert guest.ask(request(READ, [(guest.good[0], 0, 7), (ring_page, 7, 7)], abi=abi)) == [OKAY]


def test_indirect_pages_that_lie(guest: Guest) -> None:
    abi = guest.abi
    good = (guest.good[1], 0, 7)
    for lie in [(guest.good[0], 0, 8), (guest.good[0], 3, 2), (0xFFFFFFFF, 0, 7), (guest.others, 0, 7)]:
        table = [good] * 40 + [lie] + [good] * 9
        guest.table[: 8 * 50] = np.frombuffer(pack_segments(table), np.uint8)
        assert guest.ask(indirect(WRITE, guest.table_grefs, 50, abi=abi)) == [ERROR]
        assert guest.ask(indirect(READ, guest.table_grefs, 40, abi=abi)) == [OKAY]
    guest.table[: 8 * 256] = np.frombuffer(pack_segments([good] * 256), np.uint8)
    assert guest.ask(indirect(READ, guest.table_grefs, 256, sector=SECTORS - 256 * 8, abi=abi)) == [OKAY]
    assert guest.ask(indirect(READ, guest.table_grefs, 256, sector=SECTORS - 256 * 8 + 1, abi=abi)) == [ERROR]
    itself = [guest.table_grefs[0]] * 8  # the page of segments is also where the data goes
    guest.table[:64] = np.frombuffer(pack_segments([(itself[0], 0, 7)] * 8), np.uint8)
    assert guest.ask(*[indirect(READ, itself, 8, id=i, sector=i, abi=abi) for i in range(8)])[0] in (OKAY, ERROR)


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


@pytest.fixture(scope="session")
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
