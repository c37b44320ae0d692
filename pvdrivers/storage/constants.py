"""What the compiled code knows of stores, too."""

from __future__ import annotations

from typing import Final

STORE_NULL: Final = 0  # answers at once and moves nothing
STORE_MEMORY: Final = 1  # bytes at an address
STORE_FILE: Final = 2  # a file or block device by io_uring

PUNCH_HOLE: Final = 0x01 | 0x02
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE: what discard does, to files, memory and block devices alike."""
