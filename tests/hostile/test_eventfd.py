"""A guest that makes the worker's notifications block: both ends of a channel hold the same eventfd."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress

from pvdrivers.frontends.blkfront import Io
from pvdrivers.frontends.load import Load, Plan
from tests.restart.bed import Bed, until
from tests.restart.conftest import bed as restart_bed

__all__ = ["restart_bed"]

FULL = 0xFFFFFFFFFFFFFFFE


def test_a_notification_that_blocks_costs_its_guest_the_disk_and_nobody_else(restart_bed: Callable[..., Bed]) -> None:
    b = restart_bed("--workers", "1")
    b.serve()
    neighbour = b.disk("memory:8M")
    liar = b.disk("memory:8M")
    load = Load(neighbour, Plan(depth=4, write_percent=50, verify="all", length=1 << 20))
    load.start()
    until(lambda: load.snapshot().requests > 1000)
    fd = liar.queues[0]._source
    with suppress(BlockingIOError):
        os.eventfd_read(fd)
    os.eventfd_write(fd, FULL)
    os.set_blocking(fd, True)
    futures = [liar.submit(io) for io in reads(4)]
    for _ in range(10):  # however long it goes on, the neighbour is served
        before = load.snapshot().requests
        time.sleep(0.3)
        until(lambda before=before: load.snapshot().requests > before + 100, 2)
    until(lambda: "does not take a notification" in b.log.read_text())
    load.stop()
    result = load.wait(30)
    assert result.right and result.requeues == 0
    os.set_blocking(fd, False)
    for future in futures:
        future.cancel()


def reads(count: int) -> list[Io]:
    return [Io("read", n * 4096, 4096, bytearray(4096)) for n in range(count)]
