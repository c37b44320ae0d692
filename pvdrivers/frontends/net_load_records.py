"""What the packet generator's kernels work on: plain records in private memory. Addresses and counts are int64.

A packet begins with a template of `head` bytes; then a number, the time, and the first page that it is of, 8 bytes
each as far as they fit. Word w of page p, counted in 8 bytes, is p * PAGE_STEP + w, so that sums can be checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rings.atomics import records
from rings.jit import inline

FLOW = np.dtype(
    [
        ("limit", "i8"),  # slots that may be on their way; 0: what the ring holds, and the receiver is not asked
        ("on_way", "i8"),  # ... and are
        ("sent", "i8"),  # packets that were put on a ring
        ("received", "i8"),
        ("received_bytes", "i8"),
        ("lost", "i8"),  # slots that were on their way and never came
        ("busy_at", "i8"),  # when something last came, or was sent with nothing on its way
    ],
    align=True,
)
"""Packets from one vif to another. All counts run on from load to load."""

SENDER = np.dtype(
    [
        ("queue", "i8"),
        ("flow", "i8"),
        ("pages", "i8"),  # address of the first
        ("grefs", "i8"),  # i8[n_pages]: minus each one's gref
        ("n_pages", "i8"),
        ("next", "i8"),
        ("size", "i8"),
        ("gso_size", "i8"),
        ("gso_type", "i8"),
        ("template", "i8"),
        ("head", "i8"),
        ("streams", "i8"),  # source ports
        ("number", "i8"),
        ("answered", "i8"),  # slots
        ("errors", "i8"),  # ... with another status than OKAY
    ],
    align=True,
)

RECEIVER = np.dtype(
    [
        ("queue", "i8"),
        ("flow", "i8"),
        ("pages", "i8"),
        ("grefs", "i8"),
        ("n_pages", "i8"),
        ("next", "i8"),
        ("at", "i8"),  # i8[SLOTS]: address of the page that each slot's request has named
        ("look", "i8"),  # LOOK_*
        ("head", "i8"),
        ("sum", "i8"),  # of the packet that is being taken
        ("errors", "i8"),  # slots with an error
        ("wrong", "i8"),  # packets whose bytes were not what was sent
    ],
    align=True,
)

LOAD = np.dtype(
    [
        ("drain", "i8"),  # shared with Python: send no more
        ("senders", "i8"),
        ("n_senders", "i8"),
        ("receivers", "i8"),
        ("n_receivers", "i8"),
        ("flows", "i8"),
        ("n_flows", "i8"),
        ("spin", "i8"),  # looks at the rings before sleeping
        ("epoll", "i8"),  # has the epoll descriptors of all queues
        ("epoll_events", "i8"),
        ("hist", "i8"),  # u8[HIST_BUCKETS]: from the stamp in a packet to when it was seen
        ("busy_at", "i8"),  # when something was last done
        ("looked_at", "i8"),  # when flows were last looked at for what is lost
        ("sleeps", "i8"),
    ],
    align=True,
)

LOOK_SAMPLE, LOOK_HEADERS, LOOK_ALL = range(3)
"""The stamp of one packet a pass; that of each; and the sum of all bytes behind the headers."""
PAGE_STEP = 0x10001
STAMPS = 24
"""Bytes behind the template: number, time, page."""


@inline
def flow_at(at: int) -> Any:
    """The FLOW at an address."""
    return records(at, 1, FLOW)[0]


@inline
def sender_at(at: int) -> Any:
    """The SENDER at an address."""
    return records(at, 1, SENDER)[0]


@inline
def receiver_at(at: int) -> Any:
    """The RECEIVER at an address."""
    return records(at, 1, RECEIVER)[0]


@inline
def load_at(at: int) -> Any:
    """The LOAD at an address."""
    return records(at, 1, LOAD)[0]
