"""What the compiled loop works on. Plain records in private memory; addresses are int64.

A device class hands the worker a RING with two compiled addresses: `step` (take, plan, acquire, submit) and
`finish` (release, respond). The loop calls them and knows no more of the class.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.iovec import IOVEC_SIZE

# RING.state
RING_FREE = 0
RING_ATTACHING = 1  # filled in by the control thread; the worker has not seen it yet
RING_ACTIVE = 2
RING_DEAD = 3  # the peer broke the protocol; nothing is taken any more, what is in flight ends quietly
RING_DETACHING = 4  # the control thread wants it back: when nothing is in flight the worker sets RING_DETACHED
RING_DETACHED = 5

# RING.violation
V_NONE = 0
V_OVERFLOW = 1
V_RECOVERY = 2
V_EVENTS = 3
V_CLASS = 16  # from here on they are the class's own: Device.violations
VIOLATIONS = {
    V_OVERFLOW: "producer index beyond what the ring can hold",
    V_RECOVERY: "ring indices do not fit what the journal says",
    V_EVENTS: "an event channel that does not take a notification",
}


def in_words(device: Any, violation: int) -> str:
    """What the guest of a Device did, by RING.violation."""
    said: dict[int, str] = {**VIOLATIONS, **getattr(device, "violations", {})}
    return said.get(violation, "unknown violation")


WORKER = np.dtype(
    [
        ("stop", "i8"),  # first; shared with the control thread: leave the loop
        ("doorbell_fd", "i8"),
        ("alert_fd", "i8"),  # eventfd that wakes the control thread
        ("event_fd", "i8"),  # one fd for the events of all rings (real Xen), or -1: each ring has its own
        ("event_token", "i8"),
        ("event_in", "i8"),  # where the io_uring reads that fd to; 0: it is polled, and the seam reads
        ("event_in_size", "i8"),
        ("let_in_at", "i8"),  # ns: when ports of guests that storm are let in again; 0: none does
        ("wake_at", "i8"),  # ns: when the first ring with an alarm is to be served; 0: there is none
        ("house_at", "i8"),  # ns: when idle rings and events are looked at again; see loop
        ("deaf", "i8"),  # it could not be read or polled again, for want of memory: to be tried once more
        ("uring", "i8"),  # address of a URING
        ("seam", "i8"),  # address of a SEAM
        ("rings", "i8"),  # address of RING[max_rings]
        ("max_rings", "i8"),
        ("port_ring", "i8"),  # address of i4[max_ports]: port -> ring index, -1 none
        ("max_ports", "i8"),
        ("ready_head", "i8"),  # list of rings with something pending, by RING.next_ready; 0 ends it
        ("ready_tail", "i8"),
        ("done_head", "i8"),  # list of rings whose `finish` is due, by RING.next_done
        ("active_head", "i8"),  # list of rings whose events are not armed, by RING.next_active
        ("spin_ns", "i8"),
        ("nap_ns", "i8"),  # see nap: how long requests of a deep queue may be waited for; 0 never
        ("gap_ns", "i8"),  # ... from one request to the next, lately
        ("taken", "i8"),  # requests taken, by all rings
        ("nap_taken", "i8"),  # ... when the gap was looked at last
        ("nap_at", "i8"),  # ns: when that was
        ("napped", "i8"),  # ... and the pass before ended in a nap
        ("cycle_scale", "i8"),  # ns a cycle, by 2**20; 0: the clock is asked
        ("cycle_limit", "i8"),  # cycles after which it is asked again
        ("cycle_at", "i8"),  # the counter, and
        ("cycle_ns", "i8"),  # ... the clock at that time
        ("budget", "i8"),  # requests a ring may take in one visit
        ("now", "i8"),  # CLOCK_MONOTONIC, ns, once a pass
        ("inflight", "i8"),  # requests submitted to the store and not back
        ("top_ring", "i8"),  # no ring from this index on was ever used
        ("fair_depth", "i8"),  # see fair: in flight of all heavy rings together; 0 never holds back
        ("heavy_limit", "i8"),  # ... of each of them now
        ("window", "i8"),  # ns: when the last window ended
        ("kill_step", "i8"),  # tests: die at this commit point of the journal, see journal.STEPS; 0 never
        ("kill_count", "i8"),  # ... when it is reached for the kill_count-th time
        ("reverse", "i8"),  # tests: answer every batch of finished requests in reverse order
        ("ops", "i8"),  # GRANT_OP[max_ops]: the batch of a pass
        ("max_ops", "i8"),
        ("owners", "i8"),  # i8[max_ops]: the REQ that each copy of the batch is for
        ("pass_reqs", "i8"),  # i8[budget]: REQ addresses of a pass
        ("scratch", "i8"),  # 128 bytes: a request before it is brought to its native layout
        ("bounce", "i8"),  # address of the bounce pages
        ("bounce_free", "i8"),  # i4 stack of free bounce pages
        ("bounce_n", "i8"),  # how many are free
        ("bounce_reserved", "i8"),  # of these, for requests of this pass
        ("bounce_kept", "i8"),  # ... and the last of them, for rings that have none
        ("blocks_free", "i8"),  # i8 stack of addresses of free BLOCKs, for requests of many segments
        ("blocks_n", "i8"),
        ("blocks_kept", "i8"),  # the last of them are for rings that have none
        ("leaving", "i8"),  # rings that are to be detached are still on a list
        ("starved", "i8"),  # rings that have none wait for a block or for bounce pages
        ("starved_first", "i8"),  # index of the one that is woken first when there are some again
        ("zero", "i8"),  # address of ZERO_BYTES of zeros, for secure discard
        ("passes", "i8"),
        ("sleeps", "i8"),
        ("naps", "i8"),
        ("events", "i8"),
        ("calling", "i8"),  # ns: since when the worker is in a call that a guest can hold up; 0 it is in none
        ("short", "i8"),  # times that the kernel was short of memory for an I/O
        ("error", "i8"),  # -errno of io_uring that made the loop end
        ("tid", "i8"),
    ],
    align=True,
)

CALLING_AT: int = WORKER.fields["calling"][1]  # type: ignore[index]
TOP_RING_AT: int = WORKER.fields["top_ring"][1]  # type: ignore[index]
ZERO_BYTES = 1 << 20

INLINE_SEGMENTS = 11  # segments that fit into a request without a block: blkif's direct ones
BLOCK_SEGMENTS = 4096  # segments in a block: BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST x 512

SEGMENT = np.dtype([("gref", "u4"), ("offset", "u2"), ("length", "u2")], align=True)
"""A checked segment: `length` bytes, 1 to 4096, at `offset` in the page behind `gref`. Eight bytes."""

BLOCK_OPS_AT = BLOCK_SEGMENTS * SEGMENT.itemsize
BLOCK_IOV_AT = BLOCK_OPS_AT + BLOCK_SEGMENTS * 32
BLOCK_SIZE = BLOCK_IOV_AT + BLOCK_SEGMENTS * IOVEC_SIZE
"""A block: SEGMENT, GRANT_OP and IOVEC [BLOCK_SEGMENTS]. Only what is used of it is ever touched."""

POLICY_MAP = 0
POLICY_PERSISTENT = 1
POLICY_COPY = 2
POLICIES = {"map": POLICY_MAP, "persistent": POLICY_PERSISTENT, "copy": POLICY_COPY}

RING = np.dtype(
    [
        ("state", "i8"),  # first; shared with the control thread
        ("violation", "i8"),
        ("reported", "i8"),  # the control thread has told of the violation
        ("index", "i8"),
        ("worker", "i8"),  # address of the WORKER that owns it for life
        ("step", "i8"),  # seam function (worker, ring, budget, 0) -> 1 if more is pending, else 0
        ("finish", "i8"),  # seam function (worker, ring, 0, 0) -> 0
        ("end", "i8"),  # address of the RING_END
        ("device", "i8"),  # address of the class's device record
        ("priv", "i8"),  # address of the class's queue record, if it has one
        ("local", "i8"),  # address of what its class has for all rings of this worker together, if there is such
        ("port", "i8"),  # -1: it has none, and is ready when its event_fd is, a descriptor of its class's own
        ("event_fd", "i8"),
        ("event_token", "i8"),
        ("lost", "i8"),  # -errno that a descriptor of its class's own is lost by; 0: it is in order
        ("polled", "i8"),  # 0 no poll of event_fd, 1 queued, 2 being removed
        ("blocked", "i8"),  # cannot take what is pending until something else happens (hold, no resources)
        ("offered", "i8"),  # its requests are buffers that stay on it: they are no reason for an event
        ("masked", "i8"),  # its port was delivered and waits for event_unmask
        ("ready", "i8"),  # on the ready list
        ("active", "i8"),  # on the active list: events not armed
        ("next_ready", "i8"),
        ("next_active", "i8"),
        ("next_done", "i8"),
        ("due", "i8"),  # on the done list: its `finish` is to be called in this pass
        ("done_head", "i8"),  # REQs that the store gave back, by REQ.next
        ("done_tail", "i8"),
        ("inflight", "i8"),  # taken and not answered
        ("peak", "i8"),  # the most that were in flight in this window of `fair`, and in the one before
        ("last_peak", "i8"),
        ("throttled", "i8"),  # may take no more until something comes back
        ("hold_ack", "i8"),  # epoch of the device's hold that this ring has come to rest for
        ("replay_head", "i8"),  # REQs that a dead predecessor had taken, by REQ.next: executed first
        ("waiting", "i8"),  # a REQ that waits for the whole device to be at rest (barrier)
        ("barrier", "i8"),  # ... and that one, once it has begun
        ("nr_ents", "i8"),
        ("entry_size", "i8"),
        ("journal", "i8"),  # address of the JOURNAL_QUEUE, or of what its class has instead
        ("records", "i8"),  # address of JOURNAL_RECORD[nr_ents]
        ("record_size", "i8"),
        ("reqs", "i8"),  # address of the class's REQ[nr_ents]
        ("req_size", "i8"),
        ("domid", "i8"),  # whose grefs its requests name
        ("policy", "i8"),  # POLICY_*
        ("cache", "i8"),  # address of a PERSISTENT_CACHE, with POLICY_PERSISTENT
        ("pages_limit", "i8"),  # pages that requests in flight may have mapped; who would exceed it is copied
        ("pages", "i8"),  # ... and may have now
        ("bounced", "i8"),  # bounce pages that its requests in flight have
        ("blocks", "i8"),  # ... and BLOCKs
        ("keep_ns", "i8"),  # how long it keeps a page that is not used
        ("fetch_copies", "i8"),  # what is read once is copied: to map the pages did not do
        ("purged", "i8"),  # ns: when it last looked for such pages
        ("limit", "i8"),  # GNTST_* of a map that Xen had no room for: its requests are copied since then
        ("mapping", "i8"),  # ... instead of this POLICY_*
        ("failures", "i8"),  # requests that failed, and of one of them, at powers of two of these:
        ("failed_gntst", "i8"),  # ... GNTST_* of a page of it, or 0
        ("failed_res", "i8"),  # ... -errno of the store
        ("failed_at", "i8"),  # ... byte
        ("failed_bytes", "i8"),
        ("wake_at", "i8"),  # ns: when it is to be served, whatever happens until then; 0: at no time. See alarm
        ("stalled", "i8"),  # its guest takes nothing: what that means is its class's
        ("storming", "i8"),  # its guest sends events with nothing behind them: see storm
        ("storm_at", "i8"),  # ns: since when they are counted, and
        ("storm_cons", "i8"),  # ... RING_END.cons at that time
        ("storm_events", "i8"),
        ("quiet", "i8"),  # how often its port was found still in a row
        ("retry_at", "i8"),  # ns: when it is tried again
        ("retry_ns", "i8"),  # ... which is so long after it failed
        ("deepest", "i8"),  # requests that its guest has kept going at the most, lately; see nap
        ("quick", "i8"),  # how often in a row its store had finished an I/O before the call came back
        ("free", "i8"),  # i4 stack of free record indices
        ("free_n", "i8"),
        ("stats", "i8"),  # address of a STATS
    ],
    align=True,
)

HOLD_ACK_AT: int = RING.fields["hold_ack"][1]  # type: ignore[index]

REQ = np.dtype(
    [
        ("ring", "i8"),
        ("next", "i8"),
        ("res", "i8"),  # what the store said: bytes, or -errno
        ("index", "i8"),  # of its journal record
        ("taken", "i8"),  # ns
        ("failed", "i8"),  # a page could not be had: the first GNTST_* that was not okay
        ("to_guest", "i8"),  # 1: data goes to the guest's pages; 0: it comes from them
        ("nseg", "i8"),
        ("segs", "i8"),  # address of SEGMENT[nseg]: checked, private
        ("ops", "i8"),  # address of GRANT_OP[nseg]: how each page is held
        ("iov", "i8"),  # address of IOVEC[nseg]
        ("n_iov", "i8"),  # neighbours are merged
        ("nbytes", "i8"),
        ("held", "i8"),  # 1: pages are held, release them
        ("copied", "i8"),  # 1: nothing is mapped for it, bounce pages were reserved
        ("pages", "i8"),  # what it may have mapped, of its ring's pages_limit
        ("block", "i8"),  # the BLOCK it has, or 0
        ("bounced", "i8"),  # bounce pages it has; their addresses are in the ops
    ],
    align=True,
)
"""The head of every class's request: all that the loop and the grant kernels know of one.

Its address is the I/O's user_data.
"""

# user_data of completions: a REQ address, or one of these in the top bits (addresses are below 2**47).
TAG_EVENT = 1 << 60
TAG_DOORBELL = 2 << 60
TAG_REMOVED = 3 << 60
TAG_UNMASK = 4 << 60  # only if it failed
TAG_MASK = 7 << 60

HIST_BUCKETS = 256
HIST_KINDS = 3  # read, write, other

STATS = np.dtype(
    [
        ("kinds", "u8", (16,)),  # requests by kind: read, write, flush, barrier, discard, secure discard, rejected, -
        ("bytes_read", "u8"),
        ("bytes_written", "u8"),
        ("errors", "u8"),
        ("rejected", "u8"),
        ("violations", "u8"),
        ("notify_sent", "u8"),
        ("notify_saved", "u8"),
        ("events", "u8"),
        ("grants_mapped", "u8"),
        ("grants_copied", "u8"),
        ("persistent_hits", "u8"),
        ("persistent_held", "u8"),
        ("map_failures", "u8"),
        ("replayed", "u8"),
        ("inflight", "u8"),
        ("state", "u8"),  # RING.state, for the reader
        ("nr_ents", "u8"),
        ("fallbacks", "u8"),  # requests that were copied as Xen had no room to map their pages
        ("copying", "u8"),  # 1: it has had no room since, and copies
        ("idle_events", "u8"),  # those of the events that had nothing behind them
        ("pad", "u8", (4,)),  # to whole cache lines: the next queue may be another worker's
        ("hist", "u8", (HIST_KINDS, HIST_BUCKETS)),
    ],
    align=True,
)
"""Counters of one queue, in a file that `pvdrivers stats` maps. Written by the worker alone, read at any time."""
