"""What kinds of store the compiled code knows."""

from __future__ import annotations

from typing import Final

STORE_NULL: Final = 0  # answers at once and moves nothing
STORE_MEMORY: Final = 1  # bytes at an address
STORE_FILE: Final = 2  # a file or block device by io_uring
