"""The only range arithmetic of the project: whether what a guest asks for lies inside what it has.

Always in subtraction form. `start + count <= limit` wraps for a start near 2**64, and lets it pass.

The numbers come from guests as unsigned 64-bit fields and may arrive as uint64 or, after a trip through an
int64 variable, as a negative number; either way what is 2**63 or more is outside of everything.
"""

# mypy: disable-error-code=no-any-return
from __future__ import annotations

from typing import Any

import numpy as np

from .jit import JIT, inline

__all__ = ["PAGE_SHIFT", "PAGE_SIZE", "in_page", "in_range", "page_span"]

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT

# One signedness before anything is compared: to numba a uint64 of 2**63 + 1 is <= an int64 of 2**63 - 1.
_number: Any = np.int64 if JIT else int


@inline
def in_range(start: int, count: int, limit: int) -> bool:
    """Whether `count` units from `start` lie in [0, limit). None at all (count 0) may stand at the very end.

    `limit` is ours, from 0 to 2**63 - 1; start and count are anybody's.
    """
    start, count, limit = _number(start), _number(count), _number(limit)
    if start < 0 or count < 0 or count > limit:
        return False
    return start <= limit - count


@inline
def in_page(offset: int, nbytes: int) -> bool:
    """Whether bytes [offset, offset + nbytes) lie in one page."""
    return in_range(offset, nbytes, PAGE_SIZE)


@inline
def page_span(offset: int, nbytes: int) -> int:
    """How many pages bytes [offset, offset + nbytes) touch, 0 for no bytes. Both were checked before."""
    if nbytes <= 0:
        return 0
    return ((offset + nbytes - 1) >> PAGE_SHIFT) - (offset >> PAGE_SHIFT) + 1
