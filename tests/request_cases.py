"""What a frontend that lies asks of a blkback, and what it is to be told: for our own backend on the embedded Xen, and
in dom0 of a real one for the kernel's and QEMU's as well (tests/xen/test_backends.py).
"""

from __future__ import annotations

import random

import numpy as np

from tests.hostile_frontend import (
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
"""Of the disk."""
OKAY, ERROR, EOPNOTSUPP = 0, -1, -2


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


def each_rule(guest: Guest) -> dict[str, tuple[bytes, int]]:
    """One wrong thing at a time, and what is almost wrong: (request, status that we give), by name."""
    abi, good = guest.abi, guest.good
    page = [(good[0], 0, 7)]
    return {
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
        "a bare flush with a sector": (request(FLUSH, abi=abi, sector=(1 << 64) - 1), OKAY),
        "a discard of nothing": (discard(0, 0, abi=abi), OKAY),
    }


def ids_and_operations(guest: Guest) -> tuple[list[bytes], list[tuple[int, int, int]]]:
    """Requests at once, and their responses: id, operation, status."""
    page = [(guest.good[0], 0, 7)]
    guest.table[:8] = np.frombuffer(pack_segments(page), np.uint8)
    abi = guest.abi
    slots = [request(READ, page, id=(1 << 64) - 1, abi=abi), request(READ, page, id=7, abi=abi),
             request(READ, page, id=7, abi=abi), request(199, page, id=1 << 63, abi=abi),
             indirect(READ, guest.table_grefs, 1, id=9, abi=abi), discard(0, 8, id=0, abi=abi)]  # fmt: skip
    answers = [((1 << 64) - 1, READ, OKAY), (7, READ, OKAY), (7, READ, OKAY), (1 << 63, 199, EOPNOTSUPP),
               (9, READ, OKAY), (0, DISCARD, OKAY)]  # fmt: skip
    return slots, answers


def check_a_page_given_twice(guest: Guest, rounds: int) -> None:
    """One gref in many segments and requests at once; one frame behind several grefs; the ring's own page as data."""
    front, abi = guest.front, guest.abi
    frame = front.pages[1].frames[0]
    twin = front.grant(frame)
    mixed = [(guest.good[0], 0, 0), (twin, 0, 0), (guest.good[0], 1, 1)] * 3
    for _ in range(rounds):
        slots = [request(op, mixed, id=i, sector=i * 16, abi=abi) for i, op in enumerate([WRITE, READ] * 8)]
        assert guest.ask(*slots) == [OKAY] * 16
    ring_page = guest.ring.grefs[0]
    assert guest.ask(*[request(WRITE, [(ring_page, 0, 7)], id=i, abi=abi) for i in range(4)]) == [OKAY] * 4
    assert guest.ask(request(READ, [(guest.good[0], 0, 7), (ring_page, 7, 7)], abi=abi)) == [OKAY]


def check_indirect_pages_that_lie(guest: Guest) -> None:
    """One bad segment among fifty; as many as are offered; the page of segments as the page of data."""
    abi = guest.abi
    good = (guest.good[1], 0, 7)
    for lie in [(guest.good[0], 0, 8), (guest.good[0], 3, 2), (0xFFFFFFFF, 0, 7), (guest.others, 0, 7)]:
        table = [good] * 40 + [lie] + [good] * 9
        guest.table[: 8 * 50] = np.frombuffer(pack_segments(table), np.uint8)
        assert guest.ask(indirect(WRITE, guest.table_grefs, 50, abi=abi)) == [ERROR]
        assert guest.ask(indirect(READ, guest.table_grefs, 40, abi=abi)) == [OKAY]
    # Of four pages: Xen counts how often one is mapped at once in a byte.
    many = [(gref, 0, 7) for gref in guest.good * 64]
    guest.table[: 8 * 256] = np.frombuffer(pack_segments(many), np.uint8)
    assert guest.ask(indirect(READ, guest.table_grefs, 256, sector=SECTORS - 256 * 8, abi=abi)) == [OKAY]
    assert guest.ask(indirect(READ, guest.table_grefs, 256, sector=SECTORS - 256 * 8 + 1, abi=abi)) == [ERROR]
    itself = [guest.table_grefs[0]] * 8  # the page of segments is also where the data goes
    guest.table[:64] = np.frombuffer(pack_segments([(itself[0], 0, 7)] * 8), np.uint8)
    assert guest.ask(*[indirect(READ, itself, 8, id=i, sector=i, abi=abi) for i in range(8)])[0] in (OKAY, ERROR)
