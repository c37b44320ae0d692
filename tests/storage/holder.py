"""A process that opens a store, perhaps has I/O under way, and stays.

    python -m tests.storage.holder URI IDENTITY [io_uring|threads CGROUP_PROCS [RUN_DIR]]

With a kind of ring it submits eight 4 KiB requests - writes of recognisable bytes, or reads if the
disk is read only - says so, and sleeps. It is there to be killed. With a run directory the disk is where no file has
locks, but for the fence there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pvdrivers.storage import uring
from pvdrivers.storage.locks import Fence
from pvdrivers.storage.store import open_store
from pvdrivers.storage.uri import parse_disk
from tests.storage.driver import Memory, open_ring
from tests.storage.no_locks import take_away

REQUESTS = 8


def main() -> None:
    text, identity, *rest = sys.argv[1:]
    spec = parse_disk(text)
    if rest:
        Path(rest[1]).write_text("0")  # 0: this process. Into the slow control group, before the device is opened
    fence = Fence(Path(rest[2])) if len(rest) > 2 else None
    if fence is not None:
        take_away(fence.path)
    with open_store(spec, run_dir="/nonexistent", identity=identity, fence=fence) as store:
        print("open", flush=True)
        if rest:
            ring = open_ring(rest[0], keep=-1 if fence is None else fence.fd)
            mem = Memory(REQUESTS * 4096)
            opcode = uring.IORING_OP_READ if store.readonly else uring.IORING_OP_WRITE
            for n in range(REQUESTS):
                mem.bytes[n * 4096 : (n + 1) * 4096] = bytes([n + 1]) * 4096
                at = mem.address + n * 4096
                assert uring.queue_rw(ring.address, opcode, store.fd, at, 4096, n * 8192, n) == 0
            assert uring.submit(ring.address) == 0
            print("submitted", flush=True)
        time.sleep(60)


if __name__ == "__main__":
    main()
