"""`pvdrivers bench blk`: a guest's disk, end to end, beside fio on the same file and beside qemu-storage-daemon.

Ours is the whole path: a guest process with the compiled load generator, rings, grants and event channels of the
embedded Xen, and a `serve` process with its journal on. Each row has both sides ready all the time and lets them work
in turns, ours first one time and last the next; what counts is the ratio of runs that were neighbours.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import report
from .bed import Bed
from .blk_rows import ROWS, Peer, Place, Work
from .files import FILE_SIZE, Files, default_directory
from .machine import Missing, load_note, two_cpus
from .peers import fio
from .peers.qemu import StorageDaemon
from .peers.ring import RingAlone
from .turns import Measure, Run, Side, best, in_turns

__all__ = ["run"]

PAIRS, PAIRS_QUICK = 9, 3
SECONDS, SECONDS_QUICK = 2.0, 1.0  # of each single run
_NULL_SIZE = "64M"
_SPIN_US, _SPIN_LOOKS = 1000, 20_000
"""How long `serve` and the guest look before they sleep, where they have a core each: longer than any answer takes."""
_UNITS = {"rate": "/s", "bytes_per_second": "B/s"}


def run(
    quick: bool = False,
    *,
    directory: Path | None = None,
    pairs: int | None = None,
    seconds: float | None = None,
    only: Sequence[str] | None = None,
    size: int = FILE_SIZE,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure every row, or those whose `key` is in `only`; the rows in the form of report.py.

    `say` gets a line as each is done. What a row lacks is said in it.
    """
    pairs = pairs or (PAIRS_QUICK if quick else PAIRS)
    seconds = seconds or (SECONDS_QUICK if quick else SECONDS)
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        files = Files(stack, directory or default_directory(), size)
        for work in ROWS:
            if only is not None and work.key not in only:
                continue
            for row in _measure(work, files, pairs, seconds):
                rows.append(row)
                say(report.text([row]).splitlines()[-1])
    return rows


def _measure(work: Work, files: Files, pairs: int, seconds: float) -> list[dict[str, Any]]:
    """The rows of one kind of work: one for each of its peers."""
    missing: dict[str, str] = {}
    theirs: dict[str, tuple[Measure, str]] = {}
    with contextlib.ExitStack() as stack:
        try:
            ours, where = best(work.places, lambda place: _ours(work, place, files), stack)
        except Missing as e:
            return [_lacking(work, peer, str(e)) for peer in work.peers]
        for peer in work.peers:
            make = functools.partial(_PEERS[peer.kind], work, files=files)
            try:
                theirs[peer.name] = best(peer.places, make, stack)
            except Missing as e:
                missing[peer.name] = str(e)
        runs = in_turns({"": ours, **{name: measure for name, (measure, _) in theirs.items()}}, pairs, seconds)
    note = load_note()
    return [
        _lacking(work, peer, missing[peer.name])
        if peer.name in missing
        else report.row_of_pairs(
            work.name, peer.name, runs[""], runs[peer.name], key=work.figure, unit=_UNITS[work.figure],
            target=peer.target, key_of_row=work.key, ours_where=where, theirs_where=theirs[peer.name][1], note=note,
        )
        for peer in work.peers
    ]  # fmt: skip


def _lacking(work: Work, peer: Peer, what: str) -> dict[str, Any]:
    return {"work": work.name, "beside": peer.name, "key_of_row": work.key, "missing": what}


# The sides: context managers that have everything ready, and yield what does one run.


@contextlib.contextmanager
def _ours(work: Work, place: Place, files: Files) -> Iterator[Measure]:
    back, front = place.cpus(two_cpus())
    if work.store == "null":
        uri = f"null:{_NULL_SIZE}"
    else:
        uri = f"{files.path(work.store)},direct={'no' if work.store == 'tmpfs' else 'yes'}"
    uri += f",policy={work.policy}" + ("" if work.op == "write" else ",mode=r")
    with Bed(cpus=back, spin_us=_SPIN_US if place.spin else 0) as bed:
        options = {"ring_order": work.ring_order, "persistent": work.policy == "persistent"}
        guest = bed.guest(bed.disks([uri], **options), front)
        plan = {
            "block_size": work.block_size, "depth": work.depth, "random": work.random,
            "write_percent": 100.0 if work.op == "write" else 0.0, "spin": _SPIN_LOOKS if place.spin else 0,
        }  # fmt: skip
        # The first load compiles its loop, if nobody has, and has the pages granted.
        guest.ask({"run": {**plan, "requests": 2000, "seconds": 60.0}, "disk": 0}, 60.0)

        def measure(seconds: float) -> Run:
            command = {"run": {**plan, "seconds": seconds}, "disk": 0, "watch": [bed.pid]}
            return guest.ask(command, seconds)

        yield measure


@contextlib.contextmanager
def _fio(work: Work, place: Place, *, files: Files) -> Iterator[Measure]:
    job = fio.Job(files.path(work.store), work.rw, work.block_size, work.depth, direct=work.store == "disk")
    cpus = place.cpus(two_cpus())[0]
    fio.present()
    yield lambda seconds: fio.run(job, seconds, cpus)


@contextlib.contextmanager
def _qemu(work: Work, place: Place, *, files: Files) -> Iterator[Measure]:
    back, front = place.cpus(two_cpus())
    with StorageDaemon(
        files.path(work.store), depth=work.depth, block_size=work.block_size, random=work.random, cpus=back,
        client_cpus=front, iothread=place.iothread, spin=_SPIN_LOOKS if place.spin else 0,
    ) as daemon:  # fmt: skip
        while not daemon.run(0.2)["requests"]:  # the first run compiles the client's loop
            pass
        yield daemon.run


@contextlib.contextmanager
def _ring(work: Work, place: Place, *, files: Files) -> Iterator[Measure]:
    yield RingAlone().run


_PEERS: dict[str, Callable[..., Side]] = {"fio": _fio, "qemu": _qemu, "ring": _ring}
