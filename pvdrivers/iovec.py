"""struct iovec (include/uapi/linux/uio.h): what the vectored system calls and an io_uring are given."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from rings.atomics import records
from rings.jit import inline

IOVEC: Final = np.dtype([("base", "i8"), ("length", "i8")], align=True)
IOVEC_SIZE: Final = IOVEC.itemsize
assert IOVEC_SIZE == 16


@inline
def iovec_at(iovecs: int, k: int) -> Any:
    """The k-th of the IOVEC records at an address."""
    return records(iovecs + k * IOVEC_SIZE, 1, IOVEC)[0]


@inline
def put_iovec(iovecs: int, k: int, base: int, length: int) -> None:
    """The k-th of the IOVEC records at an address: `length` bytes from `base` on."""
    v = iovec_at(iovecs, k)
    v["base"], v["length"] = base, length
