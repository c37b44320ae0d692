"""``pvdrivers demo``: a guest's disk and two guests' network, on the embedded Xen, with every byte verified.

Three processes: the embedded Xen, the backend, and this one, which is toolstack and guest. A disk image is filled
through blkfront and blkback, read and overwritten at random, and read back whole; at last the image file itself is
compared with what the guest knows that it wrote. Two more are guests that talk to each other by TCP, through netfront
and netback, while the disk is read and overwritten (demo_net).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pvdrivers.errors import ConfigError, PvError

from .children import Children
from .demo_net import Talk
from .table import Table

_SIZE = 256  # MiB
_SECONDS = 8
_QUICK_SIZE, _QUICK_SECONDS = 64, 2
_BLOCK = 4096
_LARGEST = 8 << 30  # bytes of a given disk that are used: the demo is to be over in a minute
_QUEUES, _RING_ORDER, _DEPTH = 2, 2, 32
_GUEST_MIB = 64
_SERVE = ("--class", "vbd", "vif")
_LOOK = 0.25  # seconds between looks at the load
_CHUNK = 1 << 20


def run(args: argparse.Namespace) -> int:
    """0 if every byte was right."""
    seconds = args.seconds or (_QUICK_SECONDS if args.quick else _SECONDS)
    size = (args.size or (_QUICK_SIZE if args.quick else _SIZE)) << 20
    directory = Path(tempfile.mkdtemp(prefix="pvdrivers-demo-"))
    try:
        image = _image(args.disk, size, args.size is not None, getattr(args, "overwrite", False), directory)
        return Demo(directory, image, seconds, kill=getattr(args, "kill", False)).run()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _image(path: Path | None, size: int, size_given: bool, overwrite: bool, directory: Path) -> Path:
    """The image to write to: one made on the spot, or `path`, if nothing in it can be lost."""
    if path is None:
        path = directory / "disk.img"
        _make(path, size)
        return path
    path = path.absolute()
    if not path.exists():
        _make(path, size)
        return path
    if path.is_block_device() and not overwrite:
        raise ConfigError(f"{path} is a block device; --overwrite lets the demo destroy what is on it")
    if not overwrite and not _all_zeroes(path):
        raise ConfigError(
            f"{path} has contents, and the demo writes to every block: name a file that does not exist yet or is"
            " empty, or say --overwrite"
        )
    if path.is_file() and (path.stat().st_size == 0 or size_given):
        _make(path, size)
    return path


def _make(path: Path, size: int) -> None:
    try:
        with path.open("ab") as file:
            file.truncate(size)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; --size makes the image smaller") from error


def _all_zeroes(path: Path) -> bool:
    """Whether a file is empty, or nothing but zeroes; holes are not read."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            at = 0
            while at < end:
                try:
                    at = os.lseek(file.fileno(), at, os.SEEK_DATA)
                except OSError:  # ENXIO: nothing but a hole from here on
                    return True
                data = os.pread(file.fileno(), _CHUNK, at)
                if data.count(0) != len(data):
                    return False
                at += len(data)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return True


class Demo:
    """One demonstration on one image."""

    def __init__(self, directory: Path, image: Path, seconds: float, *, kill: bool) -> None:
        self._run_dir = directory / "run"
        self._run_dir.mkdir(mode=0o700)
        self._image = image
        self._seconds = seconds
        self._kill = kill
        self._table = Table()

    def run(self) -> int:
        """Everything, with all processes ended at the end, whatever happens."""
        # numba comes with it, and whoever only mistyped a path need not wait for that.
        from pvdrivers.frontends import netfront_tap
        from pvdrivers.frontends.blkfront import warm

        began = time.monotonic()
        with Children(self._run_dir) as children:
            self._table.say("starting the embedded Xen and the backend (kernels are compiled at the first start)")
            try:
                children.start("sim", "--memory", str(_GUEST_MIB * 4))
                children.launch("serve", *_SERVE)
                warm()  # the guests' kernels, while the backend does the same with its own
                netfront_tap.warm()
                children.ready("serve")
                with Talk(self._run_dir) as talk:
                    right = self._guest(children, talk)
            except (PvError, OSError):
                children.show(sys.stderr)
                raise
            died = children.dead()
            if died:
                right = False
                children.show(sys.stderr)
                self._table.say(f"{', '.join(died)} ended unexpectedly")
        seconds = time.monotonic() - began
        verdict = "every byte was right" if right else "FAILED"
        self._table.close(f"{verdict}, in {seconds:.1f} s", right)
        return 0 if right else 1

    def _guest(self, children: Children, talk: Talk) -> bool:
        from pvdrivers.frontends.load import Ledger, Plan
        from pvdrivers.storage.uri import DiskSpec

        from .guest import Guest, describe

        with Guest(self._run_dir, memory_mib=_GUEST_MIB) as guest:
            spec = DiskSpec("", path=str(self._image))
            disk = guest.attach(spec, queues=_QUEUES, ring_order=_RING_ORDER)
            self._table.say(f"{describe(disk)}, on {self._image}")
            if disk.info.readonly:
                raise PvError(f"{self._image} is read-only here, and the demo writes")
            ledger = Ledger(min(disk.info.size, _LARGEST), _BLOCK)
            size = ledger.blocks * _BLOCK
            base = Plan(block_size=_BLOCK, depth=_DEPTH, length=size, verify="all")
            whole = {"requests": ledger.blocks, "random": False, "again_percent": 0.0}
            fill = Plan(**{**vars(base), **whole, "write_percent": 100})
            mixed = Plan(**{**vars(base), "write_percent": 30, "seconds": self._seconds})
            check = Plan(**{**vars(base), **whole})
            right = self._load("write every block", disk, fill, ledger, children)
            self._table.say(talk.wait())
            talk.start(self._seconds)
            right &= self._load("read and overwrite", disk, mixed, ledger, children, kill=self._kill)
            passed, whole_talk = talk.finish()
            self._table.say(passed)
            right &= whole_talk
            right &= self._load("read every block", disk, check, ledger, children)
            disk.flush()
            if disk.requeue_count:
                self._table.say(f"{disk.requeue_count} requests were queued again, and none should have been")
                right = False
        return self._compare(ledger) and right

    def _load(self, what: str, disk: Any, plan: Any, ledger: Any, children: Children, kill: bool = False) -> bool:
        """One phase, shown while it runs."""
        from pvdrivers.frontends.load import Load

        load = Load(disk, plan, ledger)
        load.start()
        killed = not kill
        try:
            while load.running:
                time.sleep(_LOOK)
                self._table.show(what, load.snapshot(), disk)
                if not killed and load.snapshot().seconds > self._seconds / 3:
                    killed = True
                    self._table.say("the backend is killed, and started again: the guests are not to notice")
                    children.kill("serve")
                    children.start("serve", *_SERVE)
                if children.dead():
                    raise PvError(f"{', '.join(children.dead())} ended unexpectedly")
            result = load.wait(10)
        finally:
            load.stop()
        self._table.done(what, result, disk)
        if not result.right:
            self._table.say(f"{what}: {load}")
        return result.right

    def _compare(self, ledger: Any) -> bool:
        """The image file against the ledger, without any of our drivers."""
        done = 0
        with self._image.open("rb") as file:
            while done < ledger.blocks:
                data = file.read(min(_CHUNK, (ledger.blocks - done) * _BLOCK))
                if len(data) < _BLOCK or not ledger.check(done, data):
                    self._table.say(f"the image differs within {_CHUNK >> 20} MiB from byte {done * _BLOCK} on")
                    return False
                done += len(data) // _BLOCK
        self._table.say(f"the image file holds what the guest wrote: {done * _BLOCK >> 20} MiB compared")
        return True
