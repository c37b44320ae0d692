"""Control requests -> a response, and what changes by it. Pure: no I/O, total over arbitrary bytes.

Every rule of netif.h about the requests of the control ring stands here and nowhere else. `look` has the private copy
of a request and says how it is answered, or which bytes of which page it needs first; `conclude` has these, as a
private copy too, and says how it is answered then; or what is to be done first, and `mapped` and `stored` hear what
became of that. Nothing takes effect but as a whole, by the last lines.

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
    GET_GREF_MAPPING_SIZE     queue                    the limit       INVALID_PARAMETER: no such queue
    ADD_GREF_MAPPING          queue, gref, entries     all of them     NOT_SUPPORTED: the limit is 0;
                                                                       INVALID_PARAMETER: no such queue or page; more
                                                                       than a page or the limit has room for; of a gref,
                                                                       that it is there, comes twice, has other flags,
                                                                       or cannot be mapped
    DEL_GREF_MAPPING          queue, gref, entries     how many        the same of queue and page; a gref that is not
                                                                       there has that in its own status
    anything else                                                      NOT_SUPPORTED

Limits, and what the header leaves open, are as in Linux (drivers/net/xen-netback/hash.c), which says INVALID_PARAMETER
where the header has BUFFER_OVERFLOW. Words of a request that have no meaning are not looked at, as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.worker.batch import op_at
from rings.atomics import copy_bytes, i64, load32, load_acquire64, records, store32, store_release64, zero_bytes
from rings.bounds import in_range
from rings.jit import inline, kernel
from rings.netif import (
    CTRL_ADD_GREF_MAPPING,
    CTRL_BUFFER_OVERFLOW,
    CTRL_DEL_GREF_MAPPING,
    CTRL_GET_GREF_MAPPING_SIZE,
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
    GREF,
    HASH_ALGORITHM_NONE,
    HASH_ALGORITHM_TOEPLITZ,
    HASH_ALL,
    GREF_readonly,
)

from .control_records import (
    DO_FETCH,
    DO_MAP,
    DO_NOTHING,
    DO_STORE,
    FIRST_HASH_AT,
    HASH_SIZE,
    KEY_AT,
    MAPPING_AT,
    MOST_KEY,
    MOST_MAPPING,
    MOST_STAGED,
    control_at,
    current,
    hash_at,
)
from .hashing import make_table
from .staging import STAGE_SIZE, find, insert, remove, stage_at, staged_at

_ENTRY = 4
_GREF_SIZE = GREF.itemsize


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
    c["status"], c["data"], c["next"] = status, data, DO_NOTHING


@inline
def _need(ca: int, gref: int, nbytes: int) -> None:
    c = control_at(ca)
    c["gref"], c["nbytes"], c["next"] = gref, nbytes, DO_FETCH


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
    if types & ~HASH_ALL != 0 or hash_at(current(control_at(ca)["hashes"]))["algorithm"] == HASH_ALGORITHM_NONE:
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
    make_table(spare)
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


@inline
def _gref(ca: int, k: int) -> Any:
    """Entry k of the list in the payload."""
    return records(control_at(ca)["payload"] + k * _GREF_SIZE, 1, GREF)[0]


@kernel
def _look_at_grefs(ca: int, kind: int) -> None:
    """Types 8 to 10, as far as the request itself says."""
    c = control_at(ca)
    queue, entries = _word(ca, 0), _word(ca, 2)
    if queue >= c["queues"]:
        _answer(ca, CTRL_INVALID_PARAMETER, 0)
        return
    c["stage"], c["count"] = c["stages"] + queue * STAGE_SIZE, entries
    limit = stage_at(c["stage"])["limit"]
    if kind == CTRL_GET_GREF_MAPPING_SIZE:
        _answer(ca, CTRL_SUCCESS, limit)
    elif limit == 0:
        _answer(ca, CTRL_NOT_SUPPORTED, 0)
    elif entries > MOST_STAGED:
        _answer(ca, CTRL_INVALID_PARAMETER, 0)
    elif entries == 0:
        _answer(ca, CTRL_SUCCESS, 0)
    else:
        _need(ca, _word(ca, 1), entries * _GREF_SIZE)


@kernel
def _add_grefs(ca: int) -> None:
    """Have what the payload lists mapped: each has an entry then, or none has."""
    c = control_at(ca)
    done = i64(0)
    while done < c["count"]:
        wanted = _gref(ca, done)
        flags = i64(wanted["flags"])
        if flags & ~GREF_readonly != 0 or insert(c["stage"], i64(wanted["ref"]), 1 - flags) < 0:
            break
        done += 1
    if done == c["count"]:
        c["next"] = DO_MAP
        return
    for k in range(done):
        remove(c["stage"], i64(_gref(ca, k)["ref"]))
    _answer(ca, CTRL_INVALID_PARAMETER, 0)


@kernel
def _del_grefs(ca: int) -> None:
    """Have it written into the list which of it are no more. They go when the guest has that."""
    c = control_at(ca)
    for k in range(c["count"]):
        entry = find(c["stage"], i64(_gref(ca, k)["ref"]))
        if entry >= 0 and staged_at(c["stage"], entry)["leaving"] == 0:
            staged_at(c["stage"], entry)["leaving"] = 1
            _gref(ca, k)["status"] = CTRL_SUCCESS
        else:
            _gref(ca, k)["status"] = CTRL_INVALID_PARAMETER
    c["next"] = DO_STORE


@kernel
def look(ca: int) -> None:
    """A request has come: CONTROL.next is DO_NOTHING, or DO_FETCH of so many bytes of a page."""
    kind = i64(request_at(ca)["type"])
    h = hash_at(current(control_at(ca)["hashes"]))
    if kind == CTRL_SET_HASH_ALGORITHM:
        _set_algorithm(ca, _word(ca, 0))
    elif kind == CTRL_GET_HASH_FLAGS:
        if h["algorithm"] == HASH_ALGORITHM_NONE:
            _answer(ca, CTRL_NOT_SUPPORTED, 0)
        else:
            _answer(ca, CTRL_SUCCESS, HASH_ALL)
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
    elif kind >= CTRL_GET_GREF_MAPPING_SIZE and kind <= CTRL_DEL_GREF_MAPPING:
        _look_at_grefs(ca, kind)
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
    elif kind == CTRL_SET_HASH_MAPPING:
        _set_mapping(ca, _word(ca, 1), _word(ca, 2))
    elif kind == CTRL_ADD_GREF_MAPPING:
        _add_grefs(ca)
    else:
        _del_grefs(ca)


@kernel
def mapped(ca: int, ops: int) -> int:
    """After DO_MAP: GRANT_OP[count] says what came of each gref. How many are not to be kept, and are to be unmapped:
    all that have a handle, if there was one that could not be had; then their handles are in the first operations."""
    c = control_at(ca)
    lost = i64(0)
    for k in range(c["count"]):
        if op_at(ops, k)["status"] != 0:
            lost = i64(1)
    unmaps = i64(0)
    for k in range(c["count"]):
        gref, op = i64(_gref(ca, k)["ref"]), op_at(ops, k)
        if lost == 0:
            entry = staged_at(c["stage"], find(c["stage"], gref))
            entry["address"], entry["handle"] = op["address"], op["handle"]
            continue
        remove(c["stage"], gref)
        if op["status"] == 0:
            op_at(ops, unmaps)["handle"] = op["handle"]
            unmaps += 1
    _answer(ca, CTRL_SUCCESS if lost == 0 else CTRL_INVALID_PARAMETER, 0)
    return unmaps


@kernel
def stored(ca: int, status: int, ops: int) -> int:
    """After DO_STORE, whose GNTST_* is `status`: how many grefs are no more, and are to be unmapped; their handles are
    in the first operations. A guest that cannot be told which they are keeps all."""
    c = control_at(ca)
    unmaps = i64(0)
    for k in range(c["count"]):
        if _gref(ca, k)["status"] != CTRL_SUCCESS:
            continue
        gref = i64(_gref(ca, k)["ref"])
        if status != 0:
            staged_at(c["stage"], find(c["stage"], gref))["leaving"] = 0
        else:
            op_at(ops, unmaps)["handle"] = remove(c["stage"], gref)
            unmaps += 1
    _answer(ca, CTRL_SUCCESS if status == 0 else CTRL_INVALID_PARAMETER, unmaps)
    return unmaps
