"""How kernels are compiled: the only place with numba options.

A kernel is a small function over integers and addresses that C could have been written for. It runs without
the GIL, raises nothing, allocates nothing, and has a plain Python life of its own under
``NUMBA_DISABLE_JIT=1``.

The cache. numba's own cache looks at the modification time of the one file that holds a kernel, so an edit to
a helper in another file would leave old machine code running - old *bounds checks*, in our case. Here the
cache directory is named by a digest of every source file that can hold a kernel, so stale code cannot be
found at all. And since it is native code that root may run, the directory is the user's own, mode 0700; any
other is refused.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core import config as _config
from numba.core import sigutils as _sigutils

__all__ = [
    "JIT",
    "SEAM",
    "CacheDirError",
    "address_of",
    "cache_dir",
    "compile_for",
    "inline",
    "kernel",
    "seam_function",
]

config: Any = _config

JIT: bool = not config.DISABLE_JIT
"""False under NUMBA_DISABLE_JIT=1, when every kernel and intrinsic is its plain Python twin."""

_PACKAGES = ("rings", "pvdrivers", "blkback", "netback", "scsiback", "usbback")
# Settings that change the machine code but not its sources.
_SETTINGS = ("NUMBA_BOUNDSCHECK", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT", "NUMBA_DEBUGINFO")


class CacheDirError(Exception):
    """The directory for compiled code can be written by somebody else, or cannot be made."""


def _digest() -> str:
    h = hashlib.sha256(f"{sys.version}|{numba.__version__}".encode())
    for name in _SETTINGS:
        h.update(f"{name}={os.environ.get(name, '')}|".encode())
    root = Path(__file__).resolve().parent.parent
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            h.update(str(path.relative_to(root)).encode())
            h.update(path.read_bytes())
    return h.hexdigest()[:24]


def _private(path: Path) -> None:
    """Make `path`, or make sure that it is ours alone."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    st = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(st.st_mode) or st.st_uid != os.geteuid() or st.st_mode & 0o022:
        raise CacheDirError(
            f"cache directory {path}: owner {st.st_uid}, mode {stat.S_IMODE(st.st_mode):04o}; compiled code"
            f" is loaded from it, so it must belong to user {os.geteuid()} and be writable by nobody else:"
            " chmod 700 it, or name another with PVDRIVERS_CACHE_DIR"
        )
    # Who may rename a directory above may put another in this one's place, between this look and the load.
    for above in path.parents:
        mode = os.stat(above).st_mode
        if mode & 0o002 and not mode & stat.S_ISVTX:
            raise CacheDirError(
                f"cache directory {path}: everybody can rename what is in {above}, mode"
                f" {stat.S_IMODE(mode):04o}; name another with PVDRIVERS_CACHE_DIR"
            )


def cache_dir() -> Path:
    """The directory with this version's compiled kernels. Raises CacheDirError if others can write to it."""
    base = os.environ.get("PVDRIVERS_CACHE_DIR")
    if base is None:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pvdrivers")
    top = Path(base).absolute()
    try:
        _private(top)
        _private(top / _DIGEST)
    except OSError as e:
        raise CacheDirError(
            f"cache directory {top}: {e.strerror}; name one that can be made with PVDRIVERS_CACHE_DIR"
        ) from e
    return top / _DIGEST


_DIGEST = _digest()
if JIT:
    config.CACHE_DIR = str(cache_dir())


def kernel(fn: Callable[..., Any]) -> Any:
    """A compiled function: no GIL, cached on disk, C's rules for integer division."""
    return numba.njit(nogil=True, cache=JIT, error_model="numpy")(fn)


def inline(fn: Callable[..., Any]) -> Any:
    """A small kernel that disappears into its callers."""
    return numba.njit(nogil=True, cache=JIT, error_model="numpy", forceinline=True)(fn)


SEAM = types.int64(types.int64, types.int64, types.int64, types.int64)
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
    cfunc: Any = numba.cfunc
    return cfunc(SEAM, cache=True, nopython=True, error_model="numpy")(fn)


def address_of(fn: Any) -> int:
    """The address of a seam function, to be put into a table and called with `rings.atomics.call`."""
    return int(fn.address)


def compile_for(fn: Any, arguments: int | str) -> None:
    """Compile a kernel, or load it from the cache, for so many integers or for "(int64, bool)".

    By types, as kernels that call it do: numba's cache knows a signature in words as another one, and a process that
    finds the kernel compiled for a caller already would leave nothing there for the words.
    """
    if JIT:
        if isinstance(arguments, int):
            kinds: Any = (types.int64,) * arguments
        else:
            kinds, _ = _sigutils.normalize_signature(arguments)
        fn.compile(kinds)


def compiled_signatures(fn: Any) -> int:
    """How many versions of a kernel were compiled or loaded so far."""
    return len(getattr(fn, "signatures", ()))
