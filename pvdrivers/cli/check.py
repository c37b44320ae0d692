"""``pvdrivers check``: what this host has and lacks, and what to do about it.

Every finding is one line on standard output: ok or missing, the thing, what was found; a second line says
what to do next. The status is 1 only when something is missing without which nothing works.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import platform
import resource
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from . import check_xen
from .finding import Finding, read

_SYS_IO_URING_SETUP = 425  # the same number on every architecture
_IO_URING_PARAMS_SIZE = 120
_CAP_IPC_LOCK = 14
_MIB = 1 << 20
_WANTED_LOCKED = 256 * _MIB  # one guest's memory, registered with io_uring in one piece
_WANTED_FILES = 4096  # a disk takes a few, and a host has hundreds of disks
_WANTED_MEMORY = 512 * _MIB


def run(args: argparse.Namespace) -> int:
    """Print all findings; 1 if something essential is missing."""
    lacking = []
    for finding in findings():
        print(*finding.lines(), sep="\n")
        if finding.essential and not finding.ok:
            lacking.append(finding.name)
    if lacking:
        print(f"pvdrivers cannot run here without: {', '.join(lacking)}")
        return 1
    print("pvdrivers can run here")
    return 0


def findings() -> Iterator[Finding]:
    """Everything worth knowing about this host, the essential things first."""
    yield _python()
    yield _architecture()
    for name in ("numpy", "numba", "llvmlite", "cffi"):
        yield _package(name)
    yield _cache()
    yield _image()
    yield _memfd()
    yield _io_uring()
    yield _locked_memory()
    yield _open_files()
    yield _shared_memory()
    yield _cpus()
    yield from check_xen.findings()


def _python() -> Finding:
    return Finding(
        "python",
        sys.version_info >= (3, 11),
        platform.python_version(),
        "install Python 3.11 or later",
        essential=True,
    )


def _architecture() -> Finding:
    machine = platform.machine()
    return Finding(
        "architecture",
        machine == "x86_64" and sys.platform == "linux",
        f"{sys.platform} {machine}",
        "the kernels make their system calls as Linux on x86-64 does",
        essential=True,
    )


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, metadata.version(name), essential=True)
    except metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", f"pip install {name}", essential=True)


def _cache() -> Finding:
    """Importing rings.jit takes the look that every start takes, and refuses what others can write to."""
    try:
        from rings.jit import cache_dir

        where = cache_dir()
    except Exception as error:  # numba missing or broken, or the refusal: its text says which, and what to do
        return Finding("kernel cache", False, str(error), essential=True)
    compiled = sum(1 for _ in where.rglob("*.nbc"))
    if not compiled:
        return Finding(
            "kernel cache",
            False,
            f"{where} is empty; the first start compiles for some seconds",
            "pvdrivers warm",
        )
    return Finding("kernel cache", True, f"{compiled} compiled functions in {where}")


def _image() -> Finding:
    """As serve looks at it: what it would not run from is missing."""
    from rings import image

    try:
        if reason := image.why_none():
            return Finding("compiled image", False, reason, "serve compiles with numba then, and starts more slowly")
        functions = image.Image(image.image_file()).functions
    except Exception as error:  # what is wrong with the directory has been told already
        return Finding("compiled image", False, str(error), "pvdrivers warm; until then serve starts more slowly")
    return Finding("compiled image", True, f"{len(functions)} functions in {image.image_file()}")


def _memfd() -> Finding:
    try:
        os.close(os.memfd_create("pvdrivers-check", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except OSError as error:
        return Finding(
            "memfd",
            False,
            f"memfd_create: {error.strerror}",
            "the memory of simulated domains is made of it: allow the call in this container",
            essential=True,
        )
    return Finding("memfd", True, "memfd_create with sealing works")


def _io_uring() -> Finding:
    setting = read(Path("/proc/sys/kernel/io_uring_disabled"))
    policy = "" if setting is None else f", kernel.io_uring_disabled = {setting}"
    code = _try_io_uring()
    if code == 0:
        return Finding("io_uring", True, f"works, Linux {platform.release()}{policy}")
    if code == errno.ENOSYS:
        advice = "a kernel with io_uring is wanted; until then disks go through a slower pool of threads"
    elif setting not in (None, "0"):
        advice = "sysctl kernel.io_uring_disabled=0; until then disks go through a slower pool of threads"
    elif code == errno.ENOMEM:
        advice = "raise the limit of locked memory (ulimit -l)"
    else:
        advice = "allow io_uring_setup in this container's filter; until then disks go through slower threads"
    return Finding("io_uring", False, f"io_uring_setup: {os.strerror(code)}{policy}", advice)


def _try_io_uring() -> int:
    """Set a small ring up and throw it away: 0, or the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    params = ctypes.create_string_buffer(_IO_URING_PARAMS_SIZE)
    fd = libc.syscall(ctypes.c_long(_SYS_IO_URING_SETUP), ctypes.c_long(4), params)
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if _has_capability(_CAP_IPC_LOCK):
        return Finding("locked memory", True, "unlimited (CAP_IPC_LOCK)")
    return Finding(
        "locked memory",
        _enough(soft, _WANTED_LOCKED),
        _limit(soft, _MIB, " MiB"),
        f"ulimit -l {_WANTED_LOCKED >> 10}, or LimitMEMLOCK= in the unit; until then guest memory is"
        " not registered with io_uring, and I/O costs more",
    )


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Finding(
        "open files",
        _enough(soft, _WANTED_FILES),
        f"{_limit(soft)} (at most {_limit(hard)})",
        f"ulimit -n {_WANTED_FILES}, or LimitNOFILE= in the unit, to serve hundreds of disks",
    )


def _shared_memory() -> Finding:
    """Domain memory is memfds: bounded by memory and control group, not by the size of /dev/shm."""
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in (read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            room = int(line.split()[1]) << 10
    limit, used = (read(Path("/sys/fs/cgroup", name)) for name in ("memory.max", "memory.current"))
    if limit is not None and limit.isdigit() and used is not None:
        room = min(room, max(0, int(limit) - int(used)))
    return Finding(
        "shared memory",
        room >= _WANTED_MEMORY,
        f"room for {room // _MIB} MiB",
        f"free some: a demo with its guest takes up to {_WANTED_MEMORY // _MIB} MiB",
    )


def _cpus() -> Finding:
    count = len(os.sched_getaffinity(0))
    return Finding(
        "cpus",
        count >= 2,
        f"{count} to run on (of {os.cpu_count()})",
        "with one, guest and backend take turns; polling between them gains nothing",
    )


def _has_capability(bit: int) -> bool:
    for line in (read(Path("/proc/self/status")) or "").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> bit & 1)
    return False


def _enough(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted


def _limit(value: int, unit: int = 1, name: str = "") -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value // unit}{name}"
