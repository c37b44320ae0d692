"""``pvdrivers warm``: compile all kernels now, so that nothing is compiled later."""

from __future__ import annotations

import argparse
import importlib
import time
from importlib.util import find_spec

_MORE = ("pvdrivers.sim.joined", "pvdrivers.xen.joined", "pvdrivers.frontends.blkfront")
"""What has kernels that are compiled when it is imported, or a warm() of its own, and is no device class."""


def run(args: argparse.Namespace) -> int:
    """Compile, and say how long it took and where the code is."""
    began = time.monotonic()
    from pvdrivers import classes
    from rings.jit import cache_dir

    classes.warm()
    for name in _MORE:
        if find_spec(name) is not None:
            compile_all = getattr(importlib.import_module(name), "warm", None)
            if compile_all is not None:
                compile_all()
    seconds = time.monotonic() - began
    where = cache_dir()
    files = list(where.rglob("*.nb[ci]"))
    size = sum(file.stat().st_size for file in files) / (1 << 20)
    print(f"warm: {', '.join(sorted(classes.known()))} in {seconds:.1f} s; {size:.1f} MiB in {where}")
    return 0
