"""Control requests -> a response, and what changes by it. Pure: no I/O, total over arbitrary bytes.

Every rule of netif.h about the requests of the control ring stands here and nowhere else. `look` has the private copy
of a request and says how it is answered, or which bytes of which page it needs first; `conclude` has these, as a
private copy too, and says how it is answered then. Nothing takes effect but by the last line of either, as a whole.

    type                      with                     done            refused
    SET_HASH_ALGORITHM        algorithm                NONE, TOEPLITZ  INVALID_PARAMETER
    GET_HASH_FLAGS            -                        all four types  NOT_SUPPORTED without an algorithm
    SET_HASH_FLAGS            types                    these           INVALID_PARAMETER: another bit; no algorithm
    SET_HASH_KEY              gref, bytes              the key         BUFFER_OVERFLOW: more than MOST_KEY;
                                                                       INVALID_PARAMETER: the page cannot be had
    GET_HASH_MAPPING_SIZE     -                        MOST_MAPPING    -
    SET_HASH_MAPPING_SIZE     entries                  all zero        INVALID_PARAMETER: more than MOST_MAPPING
    SET_HASH_MAPPING          gref, entries, offset    these           BUFFER_OVERFLOW: more than MOST_MAPPING;
                                                                       INVALID_PARAMETER: beyond the table (XSA-270), a
                                                                       queue that there is not, or no such page
    anything else                                                      NOT_SUPPORTED

Limits, and what the header leaves open, are as in Linux (drivers/net/xen-netback/hash.c), which says INVALID_PARAMETER
where the header has BUFFER_OVERFLOW. Words of a request that have no meaning are not looked at, as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rings.atomics import copy_bytes, i64, load32, load_acquire64, records, store32, store_release64, zero_bytes
from rings.bounds import in_range
from rings.jit import inline, kernel
from rings.netif import (
    CTRL_BUFFER_OVERFLOW,
    CTRL_GET_HASH_FLAGS,
    CTRL_GET_HASH_MAPPING_SIZE,
    CTRL_INVALID_PARAMETER,
    CTRL_NOT_SUPPORTED,
    CTRL_REQUEST,
    CTRL_SET_HASH_ALGORITHM,
    CTRL_SET_HASH_FLAGS,
    CTRL_SET_HASH_KEY,
    CTRL_SET_HASH_MAPPING,
    CTRL_SET_HASH_MAPPING_SIZE,
    CTRL_SUCCESS,
    HASH_ALGORITHM_NONE,
    HASH_ALGORITHM_TOEPLITZ,
    HASH_IPV4,
    HASH_IPV4_TCP,
    HASH_IPV6,
    HASH_IPV6_TCP,
)

from .control_records import (
    FIRST_HASH_AT,
    HASH_SIZE,
    KEY_AT,
    MAPPING_AT,
    MOST_HASHED,
    MOST_KEY,
    MOST_MAPPING,
    control_at,
    current,
    hash_at,
)
from .hashing import make_table

ALL_TYPES = HASH_IPV4 | HASH_IPV4_TCP | HASH_IPV6 | HASH_IPV6_TCP
_ENTRY = 4
_SCRATCH_AT = 4096 - MOST_HASHED  # of the payload, which is a key of MOST_KEY bytes then


@inline
def request_at(ca: int) -> Any:
    """The private copy of the request."""
    return records(control_at(ca)["request"], 1, CTRL_REQUEST)[0]


@inline
def _word(ca: int, k: int) -> int:
    return i64(request_at(ca)["data"][k])


@inline
def _answer(ca: int, status: int, data: int) -> None:
    c = control_at(ca)
    c["status"], c["data"], c["fetch"] = status, data, 0


@inline
def _need(ca: int, gref: int, nbytes: int) -> None:
    c = control_at(ca)
    c["gref"], c["fetch"] = gref, nbytes


@kernel
def _change(ca: int) -> int:
    """The spare HASH, equal to the one in force: its address."""
    hashes = control_at(ca)["hashes"]
    spare = hashes + FIRST_HASH_AT + (1 - (load_acquire64(hashes) & 1)) * HASH_SIZE
    copy_bytes(spare, current(hashes), HASH_SIZE)
    return spare


@inline
def _in_force(ca: int) -> None:
    """The spare one is the one from now on, and all of it."""
    hashes = control_at(ca)["hashes"]
    store_release64(hashes, i64(1) - (load_acquire64(hashes) & 1))
    _answer(ca, CTRL_SUCCESS, 0)


@kernel
def _set_algorithm(ca: int, algorithm: int) -> None:
    if algorithm != HASH_ALGORITHM_NONE and algorithm != HASH_ALGORITHM_TOEPLITZ:
        _answer(ca, CTRL_INVALID_PARAMETER, 0)
        return
    hash_at(_change(ca))["algorithm"] = algorithm
    _in_force(ca)


@kernel
def _set_types(ca: int, types: int) -> None:
    if types & ~ALL_TYPES != 0 or hash_at(current(control_at(ca)["hashes"]))["algorithm"] == HASH_ALGORITHM_NONE:
        _answer(ca, CTRL_INVALID_PARAMETER, 0)
        return
    hash_at(_change(ca))["types"] = types
    _in_force(ca)


@kernel
def _set_mapping_size(ca: int, entries: int) -> None:
    if entries > MOST_MAPPING:
        _answer(ca, CTRL_INVALID_PARAMETER, 0)
        return
    spare = _change(ca)
    hash_at(spare)["entries"] = entries
    zero_bytes(spare + MAPPING_AT, MOST_MAPPING * _ENTRY)
    _in_force(ca)


@kernel
def _set_key(ca: int, size: int) -> None:
    """The key is in the payload; what is behind it is zero."""
    spare = _change(ca)
    hash_at(spare)["key_size"] = size
    zero_bytes(spare + KEY_AT, MOST_KEY)
    copy_bytes(spare + KEY_AT, control_at(ca)["payload"], size)
    make_table(spare, control_at(ca)["payload"] + _SCRATCH_AT)
    _in_force(ca)


@kernel
def _set_mapping(ca: int, entries: int, offset: int) -> None:
    """The entries are in the payload, and have their place in the table."""
    payload = control_at(ca)["payload"]
    for k in range(entries):
        if i64(load32(payload + k * _ENTRY)) >= control_at(ca)["queues"]:
            _answer(ca, CTRL_INVALID_PARAMETER, 0)
            return
    spare = _change(ca)
    for k in range(entries):
        store32(spare + MAPPING_AT + (offset + k) * _ENTRY, np.uint32(load32(payload + k * _ENTRY)))
    _in_force(ca)


@kernel
def look(ca: int) -> None:
    """A request has come: CONTROL.fetch says how many bytes of page CONTROL.gref it needs; 0, and it is answered."""
    kind = i64(request_at(ca)["type"])
    h = hash_at(current(control_at(ca)["hashes"]))
    if kind == CTRL_SET_HASH_ALGORITHM:
        _set_algorithm(ca, _word(ca, 0))
    elif kind == CTRL_GET_HASH_FLAGS:
        if h["algorithm"] == HASH_ALGORITHM_NONE:
            _answer(ca, CTRL_NOT_SUPPORTED, 0)
        else:
            _answer(ca, CTRL_SUCCESS, ALL_TYPES)
    elif kind == CTRL_SET_HASH_FLAGS:
        _set_types(ca, _word(ca, 0))
    elif kind == CTRL_SET_HASH_KEY:
        if _word(ca, 1) > MOST_KEY:
            _answer(ca, CTRL_BUFFER_OVERFLOW, 0)
        elif _word(ca, 1) == 0:
            _set_key(ca, 0)
        else:
            _need(ca, _word(ca, 0), _word(ca, 1))
    elif kind == CTRL_GET_HASH_MAPPING_SIZE:
        _answer(ca, CTRL_SUCCESS, MOST_MAPPING)
    elif kind == CTRL_SET_HASH_MAPPING_SIZE:
        _set_mapping_size(ca, _word(ca, 0))
    elif kind == CTRL_SET_HASH_MAPPING:
        if _word(ca, 1) > MOST_MAPPING:
            _answer(ca, CTRL_BUFFER_OVERFLOW, 0)
        elif not in_range(_word(ca, 2), _word(ca, 1), h["entries"]):
            _answer(ca, CTRL_INVALID_PARAMETER, 0)
        elif _word(ca, 1) == 0:
            _answer(ca, CTRL_SUCCESS, 0)
        else:
            _need(ca, _word(ca, 0), _word(ca, 1) * _ENTRY)
    else:
        _answer(ca, CTRL_NOT_SUPPORTED, 0)


@kernel
def conclude(ca: int, status: int) -> None:
    """The bytes are in the payload; or could not be had, with a `status` (GNTST_*) that is not 0."""
    kind = i64(request_at(ca)["type"])
    if status != 0:
        _answer(ca, CTRL_INVALID_PARAMETER, 0)
    elif kind == CTRL_SET_HASH_KEY:
        _set_key(ca, _word(ca, 1))
    else:
        _set_mapping(ca, _word(ca, 1), _word(ca, 2))
