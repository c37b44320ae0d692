"""What the control ring works on: the hash that a guest has asked for, twice, and one request under way.

A HASH is never changed where it is in force: the spare one is, and then HASHES.which says that it is the one. So a
packet is hashed by all of the old one or by all of the new.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rings.atomics import load_acquire64, records
from rings.jit import inline

MOST_KEY = 40
"""Bytes of a key (XEN_NETBK_MAX_HASH_KEY_SIZE of Linux): what is behind it in a longer one is never reached."""
MOST_MAPPING = 128
"""Entries of a mapping table (XEN_NETBK_MAX_HASH_MAPPING_SIZE)."""
MOST_STAGED = 512
"""Grefs of a queue that are kept mapped: as many as a list of them has room for, and as a queue of netfront has."""
MOST_HASHED = 36
"""Bytes of a packet that are hashed: of IPV6_TCP."""

HASH = np.dtype(
    [
        ("algorithm", "i8"),  # HASH_ALGORITHM_*
        ("types", "i8"),  # HASH_* that the guest wants
        ("key_size", "i8"),
        ("entries", "i8"),  # of the mapping; 0: modulo the number of queues
        ("key", "u1", (MOST_KEY,)),
        ("mapping", "u4", (MOST_MAPPING,)),
        ("nibbles", "u4", (2 * MOST_HASHED * 16,)),  # what each value of each nibble adds, by the key: see hashing
    ],
    align=True,
)
KEY_AT: int = HASH.fields["key"][1]  # type: ignore[index]
MAPPING_AT: int = HASH.fields["mapping"][1]  # type: ignore[index]
NIBBLES_AT: int = HASH.fields["nibbles"][1]  # type: ignore[index]
HASH_SIZE = HASH.itemsize

HASHES = np.dtype([("which", "i8"), ("hash", HASH, (2,))], align=True)
"""`which` of the two is in force: the first field."""
FIRST_HASH_AT: int = HASHES.fields["hash"][1]  # type: ignore[index]

DO_NOTHING, DO_FETCH, DO_MAP, DO_STORE = range(4)
"""CONTROL.next: it is answered; bytes of its page are wanted; the grefs in the payload are to be mapped; the payload is
to be written back to its page."""
CONTROL = np.dtype(
    [
        ("hashes", "i8"),  # address of a HASHES
        ("queues", "i8"),  # of the vif
        ("request", "i8"),  # address of a private copy of the request
        ("response", "i8"),  # ... and of its response
        ("payload", "i8"),  # ... and of what it names, once that is here: a page
        ("stages", "i8"),  # address of STAGE[queues]
        # What is said of the request.
        ("next", "i8"),  # DO_*
        ("status", "i8"),  # CTRL_*, once it is answered
        ("data", "i8"),
        ("gref", "i8"),  # the page to be fetched from, or written to,
        ("nbytes", "i8"),  # ... and how many bytes
        ("stage", "i8"),  # address of the STAGE that it is about,
        ("count", "i8"),  # ... and how many grefs the payload lists
        ("fetched", "i8"),  # GNTST_* of the page that it was fetched from
        ("worker", "i8"),  # address of the WORKER of the control ring
        ("away", "i8"),  # the request is with the worker of its STAGE, which has all of this meanwhile
    ],
    align=True,
)


@inline
def control_at(at: int) -> Any:
    """The CONTROL at an address."""
    return records(at, 1, CONTROL)[0]


@inline
def hash_at(at: int) -> Any:
    """The HASH at an address."""
    return records(at, 1, HASH)[0]


@inline
def current(hashes: int) -> int:
    """The address of the HASH that is in force, of a HASHES."""
    # Acquire: who sees which one it is sees what is in it.
    return hashes + FIRST_HASH_AT + (load_acquire64(hashes) & 1) * HASH_SIZE


assert HASHES.fields is not None and HASHES.fields["which"][1] == 0
