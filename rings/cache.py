"""Where compiled code is kept: a private directory named by a digest of every source that can hold a kernel.

numba's own cache looks at the modification time of the one file that holds a kernel, so an edit to a helper in another
file would leave old machine code running - old *bounds checks*, in our case. By its name a directory with stale code
cannot be found at all. And since it is native code that root may run, the directory is the user's own, mode 0700; any
other is refused.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from importlib import metadata
from pathlib import Path

__all__ = ["DIGEST", "PACKAGES", "CacheDirError", "cache_dir"]

PACKAGES = ("rings", "pvdrivers", "blkback", "netback", "scsiback", "usbback")
# Settings that change the machine code but not its sources.
_SETTINGS = ("NUMBA_BOUNDSCHECK", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT", "NUMBA_DEBUGINFO")


class CacheDirError(Exception):
    """The directory for compiled code can be written by somebody else, or cannot be made."""


def _numba_version() -> str:
    # Not numba's own word for it: who runs an image does not import numba.
    try:
        return metadata.version("numba")
    except metadata.PackageNotFoundError:
        return ""


def _digest() -> str:
    h = hashlib.sha256(f"{sys.version}|{_numba_version()}".encode())
    for name in _SETTINGS:
        h.update(f"{name}={os.environ.get(name, '')}|".encode())
    root = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            h.update(str(path.relative_to(root)).encode())
            h.update(path.read_bytes())
    return h.hexdigest()[:24]


DIGEST = _digest()
"""Of the sources as they were when this was imported, of the compiler's version and of its settings."""


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
        _private(top / DIGEST)
    except OSError as e:
        raise CacheDirError(
            f"cache directory {top}: {e.strerror}; name one that can be made with PVDRIVERS_CACHE_DIR"
        ) from e
    return top / DIGEST
