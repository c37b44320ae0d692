"""The cache of images: each step is made again only when the digest of what it is made from has changed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[2]
FILES = HERE / "files"
VENV = "/opt/venv"
PROJECT = "/opt/pvdrivers"


class BedError(Exception):
    """The bed cannot be built or booted; the text says what to do."""


def cache() -> Path:
    """The directory that images and results are kept in, outside the checkout."""
    base = os.environ.get("PVDRIVERS_XEN_BED")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pvdrivers-xen-bed")
    path = Path(base).absolute()
    if path.is_relative_to(CHECKOUT):
        raise BedError(f"PVDRIVERS_XEN_BED={path} is inside the checkout; name a directory outside")
    path.mkdir(parents=True, exist_ok=True)
    return path


def say(text: str) -> None:
    """One line of progress."""
    print(f"xen bed: {text}", file=sys.stderr, flush=True)


@contextmanager
def locked() -> Iterator[None]:
    """One builder at a time; a second one waits and then finds the work done."""
    with open(cache() / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another build in the same cache")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest(*inputs: str | bytes | Path) -> str:
    """Of texts, and of files by their content."""
    h = hashlib.sha256()
    for one in inputs:
        data = one.read_bytes() if isinstance(one, Path) else one.encode() if isinstance(one, str) else one
        h.update(f"{len(data)}:".encode() + data)
    return h.hexdigest()


class Made:
    """What a step has made: a directory, and the digest that names its content."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def step(name: str, inputs: Sequence[str | bytes | Path], make: Callable[[Path], None], *, kept: int = 0) -> Made:
    """The directory `name` in the cache, made by `make(empty directory)` unless its stamp fits `inputs`.

    `kept`: the last so many are kept beside each other, for what changes back and forth with the checkout.
    """
    key = digest(name, *inputs)
    if kept:
        name = f"{name}-{key[:12]}"
    out, stamp = cache() / name, cache() / f"{name}.stamp"
    if out.exists() and stamp.exists() and stamp.read_text() == key:
        stamp.touch()
        return Made(out, key)
    began = time.monotonic()
    stamp.unlink(missing_ok=True)
    new = cache() / f"{name}.new"
    for old in (new, out):
        if old.exists():
            shutil.rmtree(old)
    new.mkdir()
    make(new)
    new.rename(out)
    stamp.write_text(key)
    if kept:
        _forget(f"{name.removesuffix(key[:12])}*.stamp", kept)
    say(f"{name} made in {time.monotonic() - began:.0f} s")
    return Made(out, key)


def _forget(stamps: str, kept: int) -> None:
    """Remove all but the last used."""
    for stamp in sorted(cache().glob(stamps), key=lambda path: path.stat().st_mtime)[:-kept]:
        shutil.rmtree(stamp.with_suffix(""), ignore_errors=True)
        stamp.unlink()


def run(*words: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, quiet: bool = True) -> str:
    """A program that has to succeed; its output. Raises BedError with the end of the output."""
    done = subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
    )
    if done.returncode != 0:
        raise BedError(f"{' '.join(map(str, words))}: status {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def in_root(root: Path, script: str, binds: Mapping[Path, str] | None = None, **env: str) -> str:
    """A shell script in a chroot, in a mount namespace of its own: nothing stays mounted, whatever happens."""
    mounts = [f'mount -t proc proc "{root}/proc"', f'mount --rbind /dev "{root}/dev"']
    for outside, inside in (binds or {}).items():
        mounts += [f'mkdir -p "{root}{inside}"', f'mount --bind "{outside}" "{root}{inside}"']
    path = f"{VENV}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    inner = " && ".join([*mounts, f'exec chroot "{root}" /bin/sh -eu -c "$0"'])
    clean = {name: "" for name in ("PIP_FIND_LINKS", "PIP_CERT", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL")}
    return run(
        "unshare", "--mount", "--propagation", "private", "sh", "-eu", "-c", inner, script,
        env={**clean, "PATH": f"{path}:{os.environ['PATH']}", "HOME": "/root", **env},
    )  # fmt: skip


def link_tree(source: Path, target: Path) -> None:
    """A copy of a tree by hard links: quick, and free of disk space. Files in it may be replaced, not edited."""
    run("cp", "-al", source, target)


def make_ext4(tree: Path, image: Path, spare_mib: int = 64) -> None:
    """An ext4 image with the content of a directory, owned as it is there."""
    used = int(run("du", "-sm", tree).split()[0])
    files = sum(len(d) + len(f) for _, d, f in os.walk(tree))
    run(
        "mkfs.ext4", "-q", "-O", "^has_journal,^metadata_csum", "-m", "0", "-N", str(files + 2048),
        "-d", tree, image, f"{used + used // 8 + spare_mib}M",
    )  # fmt: skip
