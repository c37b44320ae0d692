"""What is in flight and for how long, read from the journals of a run directory while their daemons go on."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pvdrivers.journal import Journal
from pvdrivers.worker.journal import DONE, TAKEN
from rings.blkif import OP_DISCARD, OP_INDIRECT, OP_READ, OP_WRITE, REQUEST_64

_NAMES = {OP_READ: "read", OP_WRITE: "write", 2: "barrier", 3: "flush", OP_DISCARD: "discard"}


@dataclass(frozen=True)
class Inflight:
    """One request that was taken and is not answered."""

    device: str
    queue: int
    operation: str
    sector: int
    seconds: float
    """Since it was taken."""
    done: bool
    """The store has finished it; only the answer is missing."""


def inflight(path: Path, device: str) -> Iterator[Inflight]:
    """Requests in a journal, longest first. A request that ends while it is read is simply not there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        data = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return
    finally:
        os.close(fd)
    journal = Journal.view(data)
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    found = []
    for q in range(journal.n_queues if journal else 0):
        assert journal is not None
        for row in journal.records(q).copy():
            if int(row["state"]) not in (TAKEN, DONE):
                continue
            request = np.frombuffer(row["payload"].tobytes(), REQUEST_64)[0]
            operation = int(request["operation"])
            if operation == OP_INDIRECT:
                operation = int(request["nr_segments"])  # indirect_op stands there
            found.append(
                Inflight(
                    device,
                    q,
                    _NAMES.get(operation, f"operation {operation}"),
                    int(request["sector_number"]),
                    max(0.0, (now - int(row["taken"])) / 1e9),
                    int(row["state"]) == DONE,
                )
            )
    yield from sorted(found, key=lambda r: -r.seconds)
