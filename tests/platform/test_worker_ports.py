"""Which events a worker takes to which ring."""

from __future__ import annotations

import os
import time

import numpy as np

from pvdrivers.worker import loop
from pvdrivers.worker.control import Worker
from pvdrivers.worker.records import STATS
from rings import ring as ringlib
from rings.jit import kernel
from tests.platform.conftest import Bed


@kernel
def collect(worker: int, token: int) -> None:
    loop._collect_events(worker, token, 0)


@kernel
def begin(worker: int, ring: int) -> None:
    """What the loop does with a ring that has come, up to its next sleep."""
    loop._look_at_rings(worker)
    loop.unmask(worker, ring)
    loop.unmask_now(worker)


def test_an_event_that_comes_before_its_ring_is_filled_in(bed: Bed) -> None:
    # Binding makes a port pending, and on Xen one fd tells of all ports: the worker learns of it at once.
    alert, stats = os.eventfd(0), np.zeros(1, STATS)
    end, page = np.zeros(1, ringlib.RING_END), np.zeros(4096, np.uint8)
    worker = Worker(bed.back, 0, alert)
    worker.record["event_in"] = 0  # nobody submits what is queued to the io_uring here
    try:
        theirs = bed.front.open_events()
        remote = theirs.alloc_unbound(bed.back.domid)
        port = worker.events.bind_interdomain(bed.front.domid, remote)
        theirs.notify(remote)
        handle = worker.new_ring(None, port)
        shared = worker.record["event_fd"] >= 0
        token = int((worker if shared else handle).record["event_token"])
        assert ringlib.back_end(end.ctypes.data, page.ctypes.data, 32, 112) != ringlib.CORRUPT
        handle.record["end"] = end.ctypes.data
        handle.record["stats"] = stats.ctypes.data  # it would be written to through a null pointer otherwise
        collect(worker.address, token)
        assert stats[0]["events"] == 0 and handle.record["masked"] == 0

        worker.attach(handle)
        theirs.notify(remote)
        collect(worker.address, token)
        assert stats[0]["events"] == 0, "it is let in with its ring, and not before"
        begin(worker.address, handle.address)
        theirs.notify(remote)
        for _ in range(500):
            collect(worker.address, token)
            if stats[0]["events"] > 0:
                break
            time.sleep(0.01)  # on Xen it comes by way of another processor
        assert stats[0]["events"] == 1 and handle.record["masked"] == 1
        worker.drop(handle)
        theirs.close()
    finally:
        worker.stop()
        os.close(alert)
