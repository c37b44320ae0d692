"""An image: the machine code of every compiled function that Python or a table of addresses needs, in one file.

Who runs from it imports neither numba nor LLVM: it is there sooner, with a quarter of the memory. The image is made by
rings.emit (`pvdrivers warm`), lies in the cache directory beside what it was made from and is found by the same digest.
`use` loads it and has `rings.jit` take functions from it; that is for whoever imports rings.jit first.

    line 1   "pvdrivers image 1"
    line 2   SHA-256 of all that follows, in hexadecimal
    line 3   JSON: what the processor must be able to do, the functions, and what they call
    then     the code (see rings.link)
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import platform
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cache import cache_dir
from .link import PAGE, Linked

__all__ = ["Function", "Image", "ImageError", "image_file", "use", "why_none", "write"]

_MAGIC = b"pvdrivers image 1\n"
_HASH_AT, _DATA_AT = len(_MAGIC), len(_MAGIC) + 65
_SWITCH = "PVDRIVERS_IMAGE"
# With these set the compiled code is another, or may raise, or there is none.
_WITHOUT = ("NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK", "NUMBA_DEBUGINFO")
RESULTS: dict[str, Callable[[int], Any]] = {"int64": int, "bool": bool, "none": lambda result: None}


class ImageError(Exception):
    """There is no image that may be used here; the text says why."""


class Function:
    """A function of the image. Called from Python it runs without the GIL; `ctypes` is the bare function."""

    def __init__(self, name: str, address: int, arguments: int, result: str) -> None:
        self.__name__ = name
        self.address = address
        self.ctypes = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)(address)
        self._result = RESULTS[result]

    def __call__(self, *args: int) -> Any:
        return self._result(self.ctypes(*map(int, args)))


class Absent:
    """A kernel that only other kernels call: its code is in theirs."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: int) -> Any:
        raise ImageError(f"{self.__name__} is not in the image of compiled code: name it with compile_for in a warm()")


class Image:
    """An image in memory, where it stays: addresses of its functions go into tables."""

    def __init__(self, path: Path) -> None:
        """Raises ImageError if it may not be used, and says why."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as e:
            raise ImageError(f"{path}: {e.strerror}") from e
        try:
            _is_private(path, os.fstat(fd))
            about, code = _read(path, fd)
            if about["flags"] and (missing := sorted(set(about["flags"]) - processor_flags())):
                raise ImageError(f"{path}: made for a processor with {' '.join(missing)}, which this one has not")
        finally:
            os.close(fd)
        memory = _map(path, code, about["externals"])
        _for_ever.append(memory)
        base = _address(memory)
        self.functions = {name: Function(name, base + at, *kind) for name, (at, *kind) in about["functions"].items()}

    def function(self, fn: Callable[..., Any]) -> Any:
        """What stands for a kernel or a seam function."""
        name = name_of(fn)
        return self.functions.get(name) or Absent(name)

    def has(self, stands: Any) -> None:
        """Make sure that a function is there. Raises ImageError if not."""
        if isinstance(stands, Absent):
            stands()


_for_ever: list[mmap.mmap] = []
active: Image | None = None
"""The image that this process runs from."""


def use() -> str:
    """Run from the image, if there is one that may be used: "", or why not. Before rings.jit is imported.

    Raises CacheDirError as importing rings.jit does.
    """
    global active
    try:
        if reason := why_none():
            return reason
        if active is None:
            if "rings.jit" in sys.modules:
                return "rings.jit was imported before"
            active = Image(image_file())
    except ImageError as e:
        return str(e)
    return ""


def why_none() -> str:
    """What here rules any image out, "" if nothing does."""
    if os.environ.get(_SWITCH) == "off":
        return f"{_SWITCH}=off"
    if setting := next((name for name in _WITHOUT if os.environ.get(name, "0") not in ("", "0")), None):
        return f"{setting} is set"
    if (machine := platform.machine()) != "x86_64":
        return f"images are made for x86_64 only, this is {machine}"
    return ""


def image_file() -> Path:
    """Where this version's image is, if it is there."""
    return cache_dir() / "image"


def name_of(fn: Callable[..., Any]) -> str:
    """A function's name in an image."""
    return f"{fn.__module__}.{fn.__qualname__}"


def write(path: Path, linked: Linked, kinds: dict[str, tuple[int, str]], flags: list[str]) -> None:
    """Write an image, all or nothing. `kinds`: number of arguments and result; `flags`: of processor_flags()."""
    functions = {name: [at, *kinds[name]] for name, at in linked.entries.items()}
    about = {"flags": flags, "functions": functions, "externals": linked.externals}
    data = json.dumps(about).encode() + b"\n" + linked.code
    fd, name = tempfile.mkstemp(prefix="image.", dir=path.parent)  # mode 0600
    try:
        with open(fd, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def processor_flags() -> frozenset[str]:
    """What this processor can do, in the words of /proc/cpuinfo. Raises ImageError if that does not say."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next(line for line in file if line.startswith("flags"))
    except (OSError, StopIteration) as e:
        raise ImageError(f"/proc/cpuinfo does not tell what this processor can do ({e})") from e
    return frozenset(flags.partition(":")[2].split())


def _is_private(path: Path, st: os.stat_result) -> None:
    if not stat.S_ISREG(st.st_mode) or st.st_uid != os.geteuid() or st.st_mode & 0o022:
        raise ImageError(
            f"{path}: owner {st.st_uid}, mode {stat.S_IMODE(st.st_mode):04o}; code is run from it, so it must be a file"
            f" of user {os.geteuid()} that nobody else can write"
        )


def _read(path: Path, fd: int) -> tuple[dict[str, Any], bytes]:
    """What the image says of itself, and its code. All of it has been looked at then."""
    with open(fd, "rb", closefd=False) as file:
        content = file.read()
    if not content.startswith(_MAGIC):
        raise ImageError(f"{path}: not an image of this format")
    data = content[_DATA_AT:]
    if content[_HASH_AT : _DATA_AT - 1] != hashlib.sha256(data).hexdigest().encode():
        raise ImageError(f"{path}: damaged, its digest is not that of its content ({len(content)} bytes)")
    text, _, code = data.partition(b"\n")
    return json.loads(text), code


def _map(path: Path, code: bytes, externals: dict[str, int]) -> mmap.mmap:
    """Memory with the code, and behind it a page with the addresses of what it calls; none of it can be written.

    A copy: what was looked at is what runs, whatever becomes of the file, and the file may lie where none can be run.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    memory = mmap.mmap(-1, len(code) + PAGE)
    memory.write(code)
    for name, at in externals.items():
        address = ctypes.cast(getattr(libc, name), ctypes.c_void_p).value
        memory[at : at + 8] = (address or 0).to_bytes(8, "little")
    base = _address(memory)
    if libc.mprotect(base, len(code), mmap.PROT_READ | mmap.PROT_EXEC) or libc.mprotect(
        base + len(code), PAGE, mmap.PROT_READ
    ):
        raise ImageError(f"{path}: its code cannot be run here: {os.strerror(ctypes.get_errno())}")
    return memory


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
