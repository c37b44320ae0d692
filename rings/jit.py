"""How kernels are compiled: the only place with numba options.

A kernel is a small function over integers and addresses that C could have been written for. It runs without
the GIL, raises nothing, allocates nothing, and has a plain Python life of its own under
``NUMBA_DISABLE_JIT=1``.

What is compiled is kept on disk (see rings.cache). A process that runs from an image (see rings.image) has the machine
code of its functions from there and does not import numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import image
from .cache import CacheDirError, cache_dir

__all__ = [
    "JIT",
    "NUMBA",
    "SEAM",
    "CacheDirError",
    "address_of",
    "cache_dir",
    "compile_for",
    "inline",
    "kernel",
    "seam_function",
]

IMAGE = image.active
"""What this process runs from, if it compiles nothing."""

if IMAGE is None:
    import numba
    from numba import types
    from numba.core import config as _config
    from numba.core import sigutils as _sigutils

    config: Any = _config

JIT: bool = IMAGE is not None or not config.DISABLE_JIT
"""False under NUMBA_DISABLE_JIT=1, when every kernel and intrinsic is its plain Python twin."""

NUMBA: bool = JIT and IMAGE is None
"""Whether kernels are numba's; if not, nothing of numba and LLVM is to be defined."""

if NUMBA:
    config.CACHE_DIR = str(cache_dir())

asked: dict[str, tuple[Any, Any]] = {}
"""What Python or a table of addresses needs, by name: a kernel and the types of its arguments, or a cfunc and None."""


def kernel(fn: Callable[..., Any]) -> Any:
    """A compiled function: no GIL, cached on disk, C's rules for integer division."""
    if IMAGE is not None:
        return IMAGE.function(fn)
    return numba.njit(nogil=True, cache=JIT, error_model="numpy")(fn)


def inline(fn: Callable[..., Any]) -> Any:
    """A small kernel that disappears into its callers."""
    if IMAGE is not None:
        return IMAGE.function(fn)
    return numba.njit(nogil=True, cache=JIT, error_model="numpy", forceinline=True)(fn)


SEAM: Any = types.int64(types.int64, types.int64, types.int64, types.int64) if IMAGE is None else None
"""The one signature of all that is called by address: f(context, a, b, c) -> int64, >= 0 or -errno."""


class _PlainSeam:
    """With the JIT off there is no machine code: an address is a number that stands for the function."""

    table: dict[int, Callable[[int, int, int, int], int]] = {}

    def __init__(self, fn: Callable[[int, int, int, int], int]) -> None:
        self.address = 0x5EA0000 + len(self.table)
        self.table[self.address] = fn
        self.py = fn

    def __call__(self, ctx: int, a: int, b: int, c: int) -> int:
        return self.py(ctx, a, b, c)


def seam_function(fn: Callable[[int, int, int, int], int]) -> Any:
    """A function that the worker calls by its address (a cached cfunc of signature SEAM), see `address_of`.

    Compiled when its module is imported, so that nothing is left to compile when a guest is served.
    """
    if not JIT:
        return _PlainSeam(fn)
    if IMAGE is not None:
        return IMAGE.function(fn)
    cfunc: Any = numba.cfunc
    compiled = cfunc(SEAM, cache=True, nopython=True, error_model="numpy")(fn)
    asked[image.name_of(fn)] = compiled, None
    return compiled


def address_of(fn: Any) -> int:
    """The address of a seam function, to be put into a table and called with `rings.atomics.call`."""
    return int(fn.address)


def compile_for(fn: Any, arguments: int | str) -> None:
    """Compile a kernel, or load it from the cache, for so many integers or for "(int64, bool)".

    What Python calls while a guest is served has to be named so: nothing else is in an image. Raises ImageError in a
    process whose image has it not.

    By types, as kernels that call it do: numba's cache knows a signature in words as another one, and a process that
    finds the kernel compiled for a caller already would leave nothing there for the words.
    """
    if IMAGE is not None:
        IMAGE.has(fn)
    elif JIT:
        if isinstance(arguments, int):
            kinds: Any = (types.int64,) * arguments
        else:
            kinds, _ = _sigutils.normalize_signature(arguments)
        fn.compile(kinds)
        asked[image.name_of(fn.py_func)] = fn, kinds


def compiled_signatures(fn: Any) -> int:
    """How many versions of a kernel were compiled or loaded so far."""
    return len(getattr(fn, "signatures", ()))
