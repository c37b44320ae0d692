"""``pvdrivers warm``: compile all kernels now, so that nothing is compiled later."""

from __future__ import annotations

import argparse
import fcntl
import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

_SERVED = ("pvdrivers.sim.joined", "pvdrivers.xen.joined")
"""Whose import compiles what `serve` calls, beside the device classes."""
_MORE = ("pvdrivers.frontends.blkfront", "pvdrivers.frontends.netfront_tap")
"""What has a warm() of its own, and is not served."""


@contextmanager
def _alone(wait: bool) -> Iterator[bool]:
    """Nobody else fills this cache meanwhile; False if somebody does and is not waited for."""
    from rings.cache import cache_dir

    with open(cache_dir() / "warm.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def run(args: argparse.Namespace) -> int:
    """Compile, make an image of what `serve` needs, and say how long it took and where all that is."""
    with _alone(not args.unless_under_way) as alone:
        return _warm() if alone else 0


def _warm() -> int:
    began = time.monotonic()
    from pvdrivers import classes
    from rings.jit import JIT, cache_dir

    classes.warm(classes.known())  # also those that are served only when they are named
    for name in _SERVED:
        importlib.import_module(name)
    made = _image() if JIT else ""
    for name in _MORE:
        if find_spec(name) is not None:
            importlib.import_module(name).warm()
    seconds = time.monotonic() - began
    where = cache_dir()
    files = list(where.rglob("*.nb[ci]"))
    size = sum(file.stat().st_size for file in files) / (1 << 20)
    print(f"warm: {', '.join(sorted(classes.known()))} in {seconds:.1f} s; {size:.1f} MiB in {where}; {made}")
    return 0


def _image() -> str:
    """Make the image that `serve` runs from; what came of it, for the last line."""
    from rings import emit, image

    try:
        path = emit.write_image()
    except (image.ImageError, OSError) as e:
        return f"no image for serve: {e}"
    return f"an image for serve, {path.stat().st_size >> 10} KiB"
