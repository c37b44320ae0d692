"""``pvdrivers serve``: run the backends in the foreground."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pvdrivers.errors import PlatformError

from . import where

if TYPE_CHECKING:
    from pvdrivers.host import Host
    from pvdrivers.platform import XenStore

_MOST_WORKERS = 4
_COALESCE_US = 200


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; SIGHUP has every device look at its size again."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="pvdrivers: %(levelname).1s %(message)s")
    began = time.monotonic()
    run_dir: Path = args.run_dir
    embedded = where.embedded(run_dir)

    # Heavy from here on. Everything is compiled before the first InitWait: a guest never waits for a
    # compiler.
    from pvdrivers import classes
    from pvdrivers.device import Context
    from pvdrivers.host import Host
    from pvdrivers.platform import open_platform
    from pvdrivers.worker.control import WorkerPool

    names, notes = (args.classes, []) if embedded else classes.beside_kernel(args.classes)
    for note in notes:
        logging.getLogger("pvdrivers.host").warning("%s", note)
    table = classes.load_all(names)
    classes.warm(table)
    warm = time.monotonic() - began

    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        text = f"run directory {run_dir}: cannot be made: {e.strerror}; name another with --run-dir"
        raise PlatformError(text) from e
    if embedded:
        platform = open_platform("sim", run_dir=run_dir, strict=args.strict)
    else:
        platform = open_platform("xen")
    try:
        pool = WorkerPool(platform, args.workers or _workers(), spin_us=args.spin or 0,
                          coalesce_us=_coalesce(args.coalesce, embedded), software=args.io == "threads")  # fmt: skip
        options = {"journal": args.journal, "spin": args.spin, "strict": args.strict, "grant_pages": args.grant_pages,
                   "grant_pages_per_domain": args.grant_pages_per_domain}  # fmt: skip
        context = Context(platform, pool, run_dir, options)
        host = Host(
            context,
            table,
            domains=args.domains,
            connect_store=_connector(run_dir, embedded),
            kernel_drivers=None if embedded else classes.KERNEL_DRIVERS,
        )

        def ready(devices: int) -> None:
            print(f"ready: {devices} device{'' if devices == 1 else 's'}, kernels warm in {warm:.2f} s", flush=True)

        with _signals(host):
            pool.start()
            try:
                host.run(ready)
            finally:
                pool.stop()
        host.close()
    except OSError as e:
        raise PlatformError(str(e)) from e
    finally:
        platform.close()
    return 0


def _coalesce(asked: int | None, embedded: bool) -> int:
    return asked if asked is not None else 0 if embedded else _COALESCE_US


def _workers() -> int:
    # A guest's vCPUs want the other cores.
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // 2))


def _connector(run_dir: Path, embedded: bool) -> Callable[[], XenStore]:
    from pvdrivers.xenstore import XenStoreClient

    return lambda: XenStoreClient.connect(where.store_path(run_dir, embedded))


@contextmanager
def _signals(host: Host) -> Iterator[None]:
    """SIGTERM and SIGINT end the host in order; SIGHUP has it look at everything again."""
    numbers = {signal.SIGTERM: host.stop, signal.SIGINT: host.stop, signal.SIGHUP: host.refresh}
    before = {number: signal.getsignal(number) for number in numbers}
    # Workers never run Python, and the main thread sleeps in a system call: a signal that some other thread
    # got is seen by nobody until something wakes the main one.
    wakeup = signal.set_wakeup_fd(host.wake_fd, warn_on_full_buffer=False)
    try:
        for number, call in numbers.items():
            signal.signal(number, lambda *_, call=call: call())
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
