"""How a guest has its packets spread over its queues: what is asked for on the control ring, and in which order."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from rings.netif import (
    CTRL_SET_HASH_ALGORITHM,
    CTRL_SET_HASH_FLAGS,
    CTRL_SET_HASH_KEY,
    CTRL_SET_HASH_MAPPING,
    CTRL_SET_HASH_MAPPING_SIZE,
    HASH_ALGORITHM_NONE,
    HASH_ALGORITHM_TOEPLITZ,
    HASH_ALL,
)

from .netfront_control import ControlRing

__all__ = ["Hash"]

_PAGE_ENTRIES = 1024


@dataclass(frozen=True)
class Hash:
    """A Toeplitz hash: `types` of netif.HASH_*, a key, and for each value, modulo the length of `mapping`, a queue.

    Without a mapping the queue is the value modulo the number of queues.
    """

    key: bytes
    types: int = HASH_ALL
    mapping: Sequence[int] = ()


def apply(ring: ControlRing, wanted: Hash | None, timeout: float) -> None:
    """Have the backend hash so, or as it likes (None). OSError as ControlRing.ask().

    The types come last: until then it steers as it likes, and never by half of what is wanted.
    """
    if wanted is None:
        ring.ask(CTRL_SET_HASH_ALGORITHM, HASH_ALGORITHM_NONE, timeout=timeout)
        return
    ring.ask(CTRL_SET_HASH_ALGORITHM, HASH_ALGORITHM_TOEPLITZ, timeout=timeout)
    ring.ask(CTRL_SET_HASH_FLAGS, 0, timeout=timeout)
    ring.ask_with(CTRL_SET_HASH_KEY, wanted.key, None, len(wanted.key), timeout=timeout)
    ring.ask(CTRL_SET_HASH_MAPPING_SIZE, len(wanted.mapping), timeout=timeout)
    for at in range(0, len(wanted.mapping), _PAGE_ENTRIES):
        part = wanted.mapping[at : at + _PAGE_ENTRIES]
        content = struct.pack(f"<{len(part)}I", *part)
        ring.ask_with(CTRL_SET_HASH_MAPPING, content, None, len(part), at, timeout=timeout)
    ring.ask(CTRL_SET_HASH_FLAGS, wanted.types, timeout=timeout)
