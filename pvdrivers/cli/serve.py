"""``pvdrivers serve``: run the backends in the foreground."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pvdrivers.errors import PlatformError
from pvdrivers.link import link_of_successor, send
from pvdrivers.notify import Notifier

from . import where

if TYPE_CHECKING:
    from pvdrivers.device import Context, Device
    from pvdrivers.host import Host
    from pvdrivers.platform import Platform, XenStore

_MOST_WORKERS = 4
_COALESCE_US = 200


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; SIGHUP has every device look at its size again."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="pvdrivers: %(levelname).1s %(message)s")
    link = link_of_successor()
    try:
        _serve(args, Notifier(), link)
    except OSError as e:
        send(link, event="failed", why=str(e))
        raise PlatformError(str(e)) from e
    except Exception as e:
        send(link, event="failed", why=str(e))
        raise
    return 0


def _serve(args: argparse.Namespace, notifier: Notifier, link: socket.socket | None) -> None:
    began = time.monotonic()
    run_dir: Path = args.run_dir
    embedded = where.embedded(run_dir)
    if not embedded:
        where.open_devices()
    with ExitStack() as stack:
        with notifier.patience("compiling"):
            make_image = _image(args)
            # Heavy from here on. Everything is compiled before the first InitWait: a guest never waits for a compiler.
            table = _classes(args, embedded)
            warm = time.monotonic() - began

            from pvdrivers import classes
            from pvdrivers.device import Context
            from pvdrivers.storage.locks import Fence
            from pvdrivers.worker.pool import WorkerPool

            _make(run_dir)
            platform = _platform(args, embedded)
            closing = stack.enter_context(ExitStack())
            closing.callback(platform.close)
            pool = WorkerPool(
                platform,
                args.workers or _workers(),
                spin_us=args.spin or 0,
                coalesce_us=_coalesce(args.coalesce, embedded),
                software=args.io == "threads",
                fence=Fence(run_dir),
            )
        options = {"journal": args.journal, "spin": args.spin, "strict": args.strict, "grant_pages": args.grant_pages,
                   "grant_pages_per_domain": args.grant_pages_per_domain, "uplinks": args.uplinks}  # fmt: skip
        classes.check_options(table, options)
        host = _host(args, Context(platform, pool, run_dir, options), table, embedded)
        stack.callback(host.close)
        service = stack.enter_context(_service(host, run_dir, notifier, link))

        def ready(devices: int) -> None:
            print(f"ready: {devices} device{'' if devices == 1 else 's'}, kernels warm in {warm:.2f} s", flush=True)
            service()
            if make_image:
                stack.callback(_make_image())

        with _signals(host, notifier):
            pool.start()
            try:
                host.run(ready)
            finally:
                # What is left may be in use until the last moment, by the kernel and by threads that let go of it.
                pool.stop(left=bool(host.lives))
                if host.lives:
                    closing.pop_all()


def _image(args: argparse.Namespace) -> bool:
    """Have this process run from the image of compiled code; if there is none, whether one should be made.

    Before anything is imported that has kernels. What other packages add to the classes is in no image.
    """
    from pvdrivers import classes
    from rings import image

    others = sorted(set(args.classes or classes.known()) - set(classes.DEVICE_CLASSES))
    why = f"{', '.join(others)}: of another package" if others else image.use()
    if why:
        logging.getLogger("pvdrivers.host").info("kernels by numba, as no image can be used: %s", why)
    return bool(why) and not others and not image.why_none()


def _make_image() -> Callable[[], None]:
    """Have an image made for the next start, by a process that gives way to all others. Returns what ends it."""
    command = [sys.executable, "-m", "pvdrivers", "warm", "--unless-under-way"]
    try:
        maker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    except OSError as e:
        logging.getLogger("pvdrivers.host").warning("no image can be made for the next start: %s", e)
        return lambda: None
    with suppress(OSError):  # a hardened unit may not allow it
        os.setpriority(os.PRIO_PROCESS, maker.pid, 19)
    threading.Thread(target=maker.wait, name="image", daemon=True).start()
    return maker.terminate


def _classes(args: argparse.Namespace, embedded: bool) -> dict[str, type[Device]]:
    from pvdrivers import classes

    names, notes = (args.classes, []) if embedded else classes.beside_kernel(args.classes)
    for note in notes:
        logging.getLogger("pvdrivers.host").warning("%s", note)
    table = classes.load_all(names)
    classes.warm(table)
    return table


def _make(run_dir: Path) -> None:
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        text = f"run directory {run_dir}: cannot be made: {e.strerror}; name another with --run-dir"
        raise PlatformError(text) from e


def _platform(args: argparse.Namespace, embedded: bool) -> Platform:
    from pvdrivers.platform import open_platform

    return open_platform("sim", run_dir=args.run_dir, strict=args.strict) if embedded else open_platform("xen")


def _host(args: argparse.Namespace, context: Context, table: dict[str, type[Device]], embedded: bool) -> Host:
    from pvdrivers.host import Host
    from pvdrivers.xenstore import XenStoreClient

    def connect() -> XenStore:
        return XenStoreClient.connect(where.store_path(args.run_dir, embedded))

    kernel = None if embedded else Path("/")
    return Host(context, table, domains=args.domains, connect_store=connect, kernel_root=kernel)


def _coalesce(asked: int | None, embedded: bool) -> int:
    return asked if asked is not None else 0 if embedded else _COALESCE_US


def _workers() -> int:
    # A guest's vCPUs want the other cores.
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // 2))


@contextmanager
def _service(host: Host, run_dir: Path, notifier: Notifier, link: socket.socket | None) -> Iterator[Callable[[], None]]:
    """What a daemon is to the outside: its record, its report, its signs of life, its successor.

    Yields what is to be called when all that is there is in hand.
    """
    from pvdrivers import daemons
    from pvdrivers.captures import Captures
    from pvdrivers.report import SUFFIX, Report
    from pvdrivers.upgrade import New, Old
    from pvdrivers.watchdog import Watchdog

    record = daemons.Record(run_dir)
    report = Report(host, record.file(SUFFIX), notifier.status)
    host.listeners.append(lambda life: report.changed())
    watchdog = Watchdog(host, notifier)
    others = {"capture": Captures(host).request}
    old = Old(host, daemons.listen(record.file("sock")), record.daemon.command, notifier.main_pid, others)

    def alone() -> None:
        notifier.main_pid(os.getpid())
        begin()

    def begin() -> None:
        notifier.ready("serving")
        report.changed()
        watchdog.start()

    new = New(host, link, begin, notifier.main_pid) if link is not None else None
    try:
        yield new.warm if new is not None else alone
    finally:
        record.remove()  # first: a successor takes the end of its link for ours
        old.close()


@contextmanager
def _signals(host: Host, notifier: Notifier) -> Iterator[None]:
    """SIGTERM and SIGINT end the host in order; SIGHUP has it look at everything again."""

    def stop() -> None:
        notifier.stopping()
        host.stop()

    def refresh() -> None:
        notifier.reloading()
        host.refresh()

    host.refreshed = lambda: notifier.ready("serving")
    numbers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: refresh}
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
