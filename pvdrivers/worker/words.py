"""Shared words and the cycle counter for Python: intrinsics only work in kernels, so here they are as kernels."""

from __future__ import annotations

import numpy as np

from pvdrivers.syscalls import cycle_counter
from rings.atomics import load_acquire64, store_release64
from rings.jit import kernel


@kernel
def load_word(address: int) -> int:
    """An acquire load of 64 bits."""
    return load_acquire64(address)


@kernel
def store_word(address: int, value: int) -> None:
    """A release store of 64 bits."""
    store_release64(address, np.int64(value))


@kernel
def count_cycles() -> int:
    """The processor's cycle counter."""
    return cycle_counter()
