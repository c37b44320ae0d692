"""Filling in the records of a vif's rings. They begin at the rings' rsp_prod: fresh, or after a process that died, of
which the last answers are put there first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pvdrivers.errors import ProtocolViolation
from pvdrivers.worker.control import Memory, RingHandle
from rings import ring as ringlib
from rings.jit import address_of, compile_for
from rings.netif import RX_ENTRY_SIZE, TX_ENTRY_SIZE

from . import queue
from .answers import ANSWERS, put_again
from .kept_file import connection_of
from .kernels import wake
from .records import RX_QUEUE
from .waiting import WAIT_BYTES

if TYPE_CHECKING:
    from .backend import Front, QueueState, VifBackend

RING_SLOTS = 256
"""In the one page that each ring has, whichever way."""


def keep_answers(device: VifBackend, said: Front, recover: bool) -> None:
    """Have ANSWERS of all rings of a vif: tx and rx of each queue, and the control ring's. Raises PvError without
    room."""
    rings = 2 * len(said.queues) + 1
    dtype = np.dtype([("rings", ANSWERS, (rings,))])
    device.kept.open("answers", dtype, connection_of(device, said), recover=recover)


def use_answers(device: VifBackend, handle: RingHandle, ring: int, recover: bool) -> None:
    """Have the ring of this number collect its answers there; what a process that died had settled is put first."""
    handle.record["journal"] = device.kept.address("answers") + ring * ANSWERS.itemsize
    if recover:
        put_again(handle.address)


def attach_ring(device: VifBackend, state: QueueState, q: int, *, tx: bool, recover: bool) -> RingHandle:
    """Fill in the RING of queue q's tx or rx ring. The worker is not told yet.

    Raises ProtocolViolation for indices that no ring can have.
    """
    assert device.counters is not None
    port = state.tx_port if tx else state.rx_port
    if not tx:
        queue_record(state, q)
    # With one event channel for both it is the tx ring's: that one has something to do when it comes.
    handle = state.worker.new_ring(device, port if tx or port != state.tx_port else -1)
    state.handles.append(handle)
    row = handle.record
    row["port"] = port
    end = np.zeros(1, ringlib.RING_END)
    state.keep.append(end)
    size = TX_ENTRY_SIZE if tx else RX_ENTRY_SIZE
    page = state.mappings[0 if tx else 1].address
    if ringlib.back_end(end.ctypes.data, page, RING_SLOTS, size) == ringlib.CORRUPT:
        text = f"queue {q}: {'tx' if tx else 'rx'} indices that no ring can have"
        raise ProtocolViolation(device.ident.domid, str(device.ident), text)
    row["step"] = address_of(queue.step_tx if tx else queue.step_rx)
    row["finish"] = address_of(queue.finish)
    row["end"], row["device"] = end.ctypes.data, device.port.address
    row["nr_ents"], row["entry_size"], row["domid"] = RING_SLOTS, size, device.ident.domid
    row["local"] = state.shard.address
    row["blocked"], row["priv"] = 0 if tx else 1, state.queue.ctypes.data
    if not tx:
        row["offered"] = 1
        state.queue[0]["rx"] = handle.address
    row["stats"] = device.counters.address(q)
    device.counters.queues[q]["nr_ents"] = RING_SLOTS
    use_answers(device, handle, 2 * q + (1 if tx else 0), recover)
    return handle


def queue_record(state: QueueState, q: int) -> None:
    """Fill in the RX_QUEUE of queue q, with memory for what waits, which is resident only as far as it was needed."""
    waiting = Memory(WAIT_BYTES)
    state.queue = np.zeros(1, RX_QUEUE)
    state.queue[0]["index"], state.queue[0]["base"] = q, waiting.address
    state.keep += [state.queue, waiting]


def wake_guest(state: QueueState) -> None:
    """Both rings of a queue, whatever the guest asked for: nobody knows how far a dead process got."""
    for handle in state.handles:
        wake(state.worker.address, handle.address)


def warm() -> None:
    """Compile what attaching calls."""
    compile_for(ringlib.back_end, 4)
    compile_for(wake, 2)
    compile_for(put_again, 1)
