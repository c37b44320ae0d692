"""The compiled path of a vif's control ring: one request at a time, and its response.

Each takes the address of a RING_END.
"""

from __future__ import annotations

from rings.atomics import i64
from rings.jit import kernel
from rings.netif import CTRL_RESPONSE
from rings.ring import final_check, push, put, take

_RESPONSE_SIZE = CTRL_RESPONSE.itemsize


@kernel
def ask(end: int, request: int) -> int:
    """Put a CTRL_REQUEST and publish it: 1 if the backend asked to be woken."""
    put(end, request)
    return i64(1) if push(end) else i64(0)


@kernel
def answer(end: int, response: int) -> int:
    """Take a CTRL_RESPONSE: 1; 0 if there is none, and the next one wakes us; or CORRUPT."""
    n = final_check(end)
    return i64(take(end, response, _RESPONSE_SIZE, 1)) if n > 0 else i64(n)


ARGUMENTS = {"ask": 2, "answer": 2}
"""What Python calls, and with how many integers, for warm()."""
