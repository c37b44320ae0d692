"""What netfront's kernels work on: plain records in private memory. Addresses are int64, counts are int64."""

from __future__ import annotations

import numpy as np

SLOTS = 256
"""Requests in each of the two rings, and pages for each: a page a slot."""
MOST_BYTES = 65535
"""Bytes of a packet on the ring (XEN_NETIF_MAX_TX_SIZE)."""
BUFFER = 65536
"""Bytes between the packets of an array."""

FRAME = np.dtype(
    [
        ("size", "i8"),
        ("csum", "i8"),  # CSUM_*, of rings.vnet
        ("gso_size", "i8"),  # bytes of a segment, 0: it is one packet
        ("gso_type", "i8"),  # netif.GSO_*
        ("hash_type", "i8"),  # netif.HASH_*, 0: nothing is said of a hash
        ("hash", "i8"),  # ... of 32 bits
    ],
    align=True,
)
"""What goes with the bytes of a packet."""

QUEUE = np.dtype(
    [
        ("stop", "i8"),  # shared with the control thread: whoever is in a kernel on this queue is to leave it
        ("tx_end", "i8"),  # addresses of RING_ENDs
        ("rx_end", "i8"),
        ("tx_port", "i8"),
        ("rx_port", "i8"),  # the same with one event channel for both
        ("tx_pages", "i8"),  # address of SLOTS pages that packets are sent from, and
        ("rx_pages", "i8"),  # ... of as many that they are received into
        ("grefs", "i8"),  # u4[2 * SLOTS]: what each was granted under, for as long as the rings live
        ("free", "i8"),  # i4 stack of tx pages that are on no request
        ("free_n", "i8"),
        ("in_flight", "i8"),  # u1[SLOTS]: tx pages that are, by their id
        ("untrusted", "i8"),  # nothing of ours may be in a page that is granted, but what is meant (XSA-403)
        ("sg", "i8"),  # the backend takes packets of several pages
        ("headroom", "i8"),  # of the packet that is being taken: free bytes before its data in each page
        ("violation", "i8"),  # V_*
        ("violation_value", "i8"),
        ("epoll", "i8"),  # descriptor to wait on: our ports', edge-triggered, and wake_fd
        ("epoll_events", "i8"),  # scratch: EPOLL_EVENT[4]
        ("wake_fd", "i8"),
        ("tokens", "i8", (2,)),  # for event_deliver
        ("message", "i8"),  # scratch of whoever receives: 64 bytes
        ("tx_message", "i8"),  # ... and of whoever sends
        ("event_ctx", "i8"),  # from here on: the platform's JIT seam
        ("event_notify", "i8"),
        ("event_deliver", "i8"),
        ("event_next", "i8"),
        ("event_unmask", "i8"),
        ("sent", "i8"),
        ("received", "i8"),
        ("bytes_sent", "i8"),
        ("bytes_received", "i8"),
        ("amended", "i8"),  # id of the request that was the last to join or leave a group, -1 none was
        ("answer", "i8"),  # ... and its status, NO_ANSWER until it has one
        ("tx_errors", "i8"),  # answered with another status than OKAY
        ("tx_dropped", "i8"),  # of a TAP: what this backend, or any ring, cannot carry
        ("rx_errors", "i8"),
        ("wakeups", "i8"),
    ],
    align=True,
)

NO_ANSWER = 2
"""No NETIF_RSP_* for a request."""
RX, TX = 1, 2
"""What arm() asks to be woken for: a packet, pages that come back."""

# What start() says.
STARTED = 1
NO_ROOM = 0  # again after a completion
TOO_BIG = -1  # more than the ring, or this backend, can carry

# QUEUE.violation
V_NONE, V_OVERFLOW, V_ID, V_RANGE, V_CHAIN, V_EXTRA = range(6)
VIOLATIONS = {
    V_OVERFLOW: "response producer index beyond what the ring can hold",
    V_ID: "response to a request that is not in flight (id {value})",
    V_RANGE: "{value} bytes are more than a page has",
    V_CHAIN: "a packet that goes on behind the last response, or for more than {value} bytes",
    V_EXTRA: "an extra that is announced and not there, or of a type that there is not",
}
