"""Programs of dom0 that misbehave, as ``python -m tests.xen.peers VERB``; each says a line when it has begun.

    hog           maps pages of dom0 in dom0 until Xen has no maptrack handle left for it; takes each that comes free
    storm DEVID   a frontend in dom0 that connects, asks for nothing, and notifies its backend without end
    burn          takes as much of a processor, for nothing
"""

from __future__ import annotations

import sys
import time

from pvdrivers import toolstack
from pvdrivers.errors import PlatformError
from pvdrivers.xen.events import XenEventChannel
from pvdrivers.xen.grants import XenGrantTable, XenMapping
from pvdrivers.xen.pages import XenGuestPages
from pvdrivers.xenstore import XenStoreClient, default_path

PAGES = 4096
"""Of our own, mapped again and again: Xen counts how often each is mapped, up to some hundred times."""


def hog() -> None:
    """Until it is killed. Its pages are all that it needs: they are mapped again and again."""
    pages, table = XenGuestPages(), XenGrantTable(whole=False)
    own = pages.alloc(PAGES)
    grefs = [pages.grant(frame, 0) for frame in own.frames]
    held: list[XenMapping] = []

    def take(count: int) -> str:
        """As many batches of that size as there are; why there are no more."""
        try:
            while True:
                first = len(held) * count % (PAGES - count + 1)
                held.append(table.map(0, grefs[first : first + count]))
        except PlatformError as e:
            return str(e)

    why = [take(count) for count in (1024, 64, 8, 1)][-1]
    print("holding", sum(one.pages for one in held), "pages:", why, flush=True)
    while True:
        time.sleep(0.02)
        take(1)


def storm(devid: str) -> None:
    """Until it is killed: the device is there, and its backend waits for a frontend."""
    store, events, pages = XenStoreClient.connect(default_path()), XenEventChannel(), XenGuestPages()
    backend, frontend = toolstack.device_paths("vbd", 0, int(devid))
    own = pages.alloc(1)
    port, gref = events.alloc_unbound(0), pages.grant(own.frames[0], 0)
    for key, value in (("ring-ref", gref), ("event-channel", port), ("protocol", "x86_64-abi"), ("state", 3)):
        store.write(f"{frontend}/{key}", value)
    while store.read(f"{backend}/state") != b"4":
        time.sleep(0.05)
    store.write(f"{frontend}/state", 4)
    print("storming", flush=True)
    while True:
        for _ in range(10_000):
            events.notify(port)


def burn() -> None:
    """Until it is killed."""
    print("burning", flush=True)
    while True:
        pass


if __name__ == "__main__":
    {"hog": hog, "storm": storm, "burn": burn}[sys.argv[1]](*sys.argv[2:])
