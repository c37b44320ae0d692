"""Event channels in the receiver's own event memory: Xen's delivery and Linux's consumption, for both ABIs.

Delivery is what xen/common/event_2l.c and event_fifo.c do when a port is signalled, consumption what Linux's
events_2l.c and events_fifo.c do with the same words (public/event_channel.h, public/xen.h). Both run in the
process that owns the memory, so no domain can write another's. One thread at a time uses a handle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rings.atomics import (
    compare_exchange32,
    exchange32,
    exchange64,
    fetch_and32,
    fetch_and64,
    fetch_or32,
    fetch_or64,
    load8,
    load32,
    load_acquire32,
    load_acquire64,
    store8,
    store32,
    store_release32,
)
from rings.jit import inline

i64: Any = np.int64  # makes small unsigned numbers safe to calculate with, compiled or not

ABI_2L = 0
ABI_FIFO = 1

# struct shared_info on a 64-bit machine: vcpu_info[32] of 64 bytes each, then the two bitmaps.
SHARED_INFO_SIZE = 4096
UPCALL_PENDING = 0  # vcpu_info.evtchn_upcall_pending, u8
PENDING_SEL = 8  # vcpu_info.evtchn_pending_sel, u64
PENDING = 2048  # shared_info.evtchn_pending[64], u64
MASK = 2560  # shared_info.evtchn_mask[64], u64

# event_channel.h
FIFO_PENDING = 1 << 31
FIFO_MASKED = 1 << 30
FIFO_LINKED = 1 << 29
FIFO_LINK_MASK = (1 << 17) - 1
FIFO_QUEUES = 16  # EVTCHN_FIFO_MAX_QUEUES; 0 is served first
FIFO_PRIORITY_DEFAULT = 7
CONTROL_READY = 0  # evtchn_fifo_control_block: u32 ready, u32 reserved, u32 head[16]
CONTROL_HEAD = 8
CONTROL_SIZE = 72

_U32 = 0xFFFF_FFFF

EVENT_CTX = np.dtype(
    [
        ("abi", "i8"),
        ("limit", "i8"),  # ports are below this
        ("ports", "i8"),  # u32 for each port: 1 + the eventfd to notify with, or 0
        ("sources", "i8"),  # u32 for each port: 1 + the eventfd to wait on, or 0
        ("shared", "i8"),  # 2-level: struct shared_info
        ("words", "i8"),  # FIFO: the event array, u32 for each port
        ("control", "i8"),  # FIFO: evtchn_fifo_control_block, and below it what Xen keeps to itself:
        ("tails", "i8"),  # u32[16], last port of each queue
        ("priorities", "i8"),  # u8 for each port, as set
        ("queues", "i8"),  # u8 for each port, the queue that it was last linked into
        ("heads", "i8"),  # u32[16], Linux's own idea of each queue's head
        ("ready", "i8"),  # Linux's copy of the ready bits, between two calls of next
        ("word", "i8"),  # 2-level, likewise: the selector bits in hand
    ],
    align=True,
)


@inline
def lowest_bit(word: int) -> int:
    """The index of the lowest set bit of a nonzero 64-bit word."""
    n = 0
    if word & 0xFFFF_FFFF == 0:
        n = 32
    for step in (16, 8, 4, 2, 1):
        if (word >> n) & ((1 << step) - 1) == 0:
            n += step
    return n


@inline
def bit64(n: int) -> int:
    """1 << n as an int64, also for n = 63."""
    return i64(1) << i64(n)


# The 2-level ABI


@inline
def set_pending_2l(shared: int, port: int) -> None:
    """evtchn_2l_set_pending."""
    word, bit = (port >> 6) * 8, bit64(port & 63)
    if fetch_or64(shared + PENDING + word, bit) & bit != 0:
        return
    if load_acquire64(shared + MASK + word) & bit == 0:
        select_2l(shared, port)


@inline
def select_2l(shared: int, port: int) -> None:
    """Have the word of a port looked at: the second level, then the upcall."""
    selector = bit64(port >> 6)
    if fetch_or64(shared + PENDING_SEL, selector) & selector == 0:
        store8(shared + UPCALL_PENDING, 1)


@inline
def unmask_2l(shared: int, port: int) -> int:
    """evtchn_2l_unmask: 1 if the port is pending and can be delivered now."""
    word, bit = (port >> 6) * 8, bit64(port & 63)
    fetch_and64(shared + MASK + word, ~bit)
    if load_acquire64(shared + PENDING + word) & bit == 0:
        return 0
    select_2l(shared, port)
    return 1


@inline
def mask_2l(shared: int, port: int) -> None:
    """The port stays pending, but is not delivered."""
    fetch_or64(shared + MASK + (port >> 6) * 8, bit64(port & 63))


@inline
def next_2l(ctx) -> int:  # type: ignore[no-untyped-def]
    """evtchn_2l_handle_events, one port at a time: it is masked and cleared. -1 when there is none."""
    shared = ctx["shared"]
    selected = ctx["word"]
    while True:
        if load8(shared + UPCALL_PENDING) != 0:
            store8(shared + UPCALL_PENDING, 0)
            selected |= exchange64(shared + PENDING_SEL, 0)
        if selected == 0:
            ctx["word"] = 0
            return -1
        index = lowest_bit(selected)
        word = index * 8
        events = load_acquire64(shared + PENDING + word) & ~load_acquire64(shared + MASK + word)
        if events == 0:
            selected &= ~bit64(index)
        else:
            port = (index << 6) | lowest_bit(events)
            mask_2l(shared, port)
            fetch_and64(shared + PENDING + word, ~bit64(port & 63))
            ctx["word"] = selected
            return port


# The FIFO ABI


@inline
def set_pending_fifo(ctx, port: int) -> None:  # type: ignore[no-untyped-def]
    """evtchn_fifo_set_pending: mark the port, and link it at the end of its queue unless it is in one."""
    at = ctx["words"] + port * 4
    fetch_or32(at, FIFO_PENDING)
    if i64(load_acquire32(at)) & (FIFO_MASKED | FIFO_LINKED) == 0:
        link_fifo(ctx, port)


@inline
def link_fifo(ctx, port: int) -> None:  # type: ignore[no-untyped-def]
    """Put a port at the end of the queue of its priority."""
    words, control = ctx["words"], ctx["control"]
    fetch_or32(words + port * 4, FIFO_LINKED)
    queue = i64(load8(ctx["priorities"] + port))
    old_queue_at = ctx["queues"] + port
    tail_at = ctx["tails"] + queue * 4
    if i64(load8(old_queue_at)) != queue:
        # It may still be remembered as the tail of the queue that it was in before: that one has ended with it.
        old_tail_at = ctx["tails"] + i64(load8(old_queue_at)) * 4
        if i64(load32(old_tail_at)) == port:
            store32(old_tail_at, 0)
        store8(old_queue_at, queue)
    tail = i64(load32(tail_at))
    linked = 0
    if tail != 0 and tail != port:
        linked = set_link_fifo(words + tail * 4, port)
    if linked == 0:
        store_release32(control + CONTROL_HEAD + queue * 4, port)
    store32(tail_at, port)
    if linked == 0:
        fetch_or32(control + CONTROL_READY, 1 << queue)


@inline
def set_link_fifo(at: int, port: int) -> int:
    """evtchn_fifo_set_link: 1 if the word was in a queue, and now names its successor."""
    while True:
        word = i64(load_acquire32(at))
        if word & FIFO_LINKED == 0:
            return 0
        if i64(compare_exchange32(at, word, word & ~FIFO_LINK_MASK | port)) == word:
            return 1


@inline
def unlink_fifo(at: int) -> int:
    """clear_linked of events_fifo.c: take a word out of its queue and return its successor, 0 if it was the last."""
    while True:
        word = i64(load_acquire32(at))
        if i64(compare_exchange32(at, word, word & ~(FIFO_LINKED | FIFO_LINK_MASK))) == word:
            return word & FIFO_LINK_MASK


@inline
def unmask_fifo(ctx, port: int) -> int:  # type: ignore[no-untyped-def]
    """EVTCHNOP_unmask: 1 if the port is pending and can be delivered now."""
    at = ctx["words"] + port * 4
    fetch_and32(at, _U32 ^ FIFO_MASKED)
    if i64(load_acquire32(at)) & FIFO_PENDING == 0:
        return 0
    set_pending_fifo(ctx, port)
    return 1


@inline
def mask_fifo(ctx, port: int) -> None:  # type: ignore[no-untyped-def]
    """The port stays pending, but is not delivered."""
    fetch_or32(ctx["words"] + port * 4, FIFO_MASKED)


@inline
def next_fifo(ctx) -> int:  # type: ignore[no-untyped-def]
    """evtchn_fifo_handle_events, one port at a time, highest priority first. -1 when there is none."""
    words, control, heads = ctx["words"], ctx["control"], ctx["heads"]
    ready = ctx["ready"]
    while True:
        ready |= i64(exchange32(control + CONTROL_READY, 0))
        if ready == 0:
            ctx["ready"] = 0
            return -1
        queue = lowest_bit(ready)
        head_at = heads + queue * 4
        port = i64(load32(head_at))
        if port == 0:
            # The queue was empty: the new head is in the control block, behind the ready bit (an acquire).
            port = i64(load_acquire32(control + CONTROL_HEAD + queue * 4))
        at = words + port * 4
        after = unlink_fifo(at)
        store32(head_at, after)
        if after == 0:
            ready &= ~(1 << queue)
        word = i64(load_acquire32(at))
        if word & FIFO_PENDING != 0 and word & FIFO_MASKED == 0:
            mask_fifo(ctx, port)
            fetch_and32(at, _U32 ^ FIFO_PENDING)
            ctx["ready"] = ready
            return port


# Either


@inline
def set_pending(ctx, port: int) -> None:  # type: ignore[no-untyped-def]
    """Xen's side of a notification."""
    if ctx["abi"] == ABI_2L:
        set_pending_2l(ctx["shared"], port)
    else:
        set_pending_fifo(ctx, port)


@inline
def mask(ctx, port: int) -> None:  # type: ignore[no-untyped-def]
    """No delivery until unmask."""
    if ctx["abi"] == ABI_2L:
        mask_2l(ctx["shared"], port)
    else:
        mask_fifo(ctx, port)


@inline
def forget(ctx, port: int) -> None:  # type: ignore[no-untyped-def]
    """A closed port: neither pending nor masked. A queue that it is in drops it on the way."""
    if ctx["abi"] == ABI_2L:
        word, bit = (port >> 6) * 8, bit64(port & 63)
        fetch_and64(ctx["shared"] + PENDING + word, ~bit)
        fetch_and64(ctx["shared"] + MASK + word, ~bit)
    else:
        fetch_and32(ctx["words"] + port * 4, _U32 ^ (FIFO_PENDING | FIFO_MASKED))
