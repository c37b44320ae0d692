"""A ring in guarded memory with both of its ends, for tests."""

from __future__ import annotations

import struct

import numpy as np

from rings.ring import RING_END, back_end, format_page, front_end
from tests.rings.guard import Guarded

WRAP = 1 << 32
STARTS = [0, 1, 2**31 - 2, 2**32 - 3]
"""Indices to begin at: from nothing, and near where signed and unsigned numbers wrap."""


class Ring:
    """One ring: `f` and `b` are the addresses of its ends, `front` and `back` the records."""

    def __init__(self, nr_ents: int, entry_size: int, start: int = 0) -> None:
        self.nr_ents, self.entry_size = nr_ents, entry_size
        self.memory = Guarded(64 + nr_ents * entry_size)
        self.sring = self.memory.address
        self.front, self.back = np.zeros(1, RING_END), np.zeros(1, RING_END)
        self.f, self.b = self.front.ctypes.data, self.back.ctypes.data
        format_page(self.sring)
        if start:
            self.indices = (start, (start + 1) % WRAP, start, (start + 1) % WRAP)
        assert front_end(self.f, self.sring, nr_ents, entry_size) == 0
        assert back_end(self.b, self.sring, nr_ents, entry_size) == 0

    @property
    def indices(self) -> tuple[int, ...]:
        """req_prod, req_event, rsp_prod, rsp_event, as they stand in the shared page."""
        return struct.unpack_from("<4I", self.memory.bytes)

    @indices.setter
    def indices(self, values: tuple[int, ...]) -> None:
        self.memory.bytes[:16] = np.frombuffer(struct.pack("<4I", *values), np.uint8)

    def poke(self, *, req_prod: int | None = None, rsp_prod: int | None = None) -> None:
        """Write a producer index over the head of the end that owns it."""
        seen = self.indices
        self.indices = (
            seen[0] if req_prod is None else req_prod % WRAP,
            seen[1],
            seen[2] if rsp_prod is None else rsp_prod % WRAP,
            seen[3],
        )
