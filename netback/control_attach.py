"""The control ring of a vif, as the control side sees it: its keys, its record, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pvdrivers.device import FrontKeys
from pvdrivers.errors import ProtocolViolation
from pvdrivers.worker.control import Memory
from rings import netif
from rings import ring as ringlib
from rings.jit import address_of

from . import control_ring, queue
from .attach import use_answers
from .control_records import CONTROL, HASHES
from .staging_share import Staging, offer

if TYPE_CHECKING:
    from .backend import QueueState, VifBackend

RING_SLOTS = 128
"""In its one page."""


@dataclass
class ControlKeys:
    """What the frontend says of its control ring: checked."""

    gref: int
    port: int


def parse_control(front: FrontKeys) -> ControlKeys | None:
    """The frontend's keys; None if it has no control ring. Raises ProtocolViolation for half of one."""
    names = (netif.KEY_CTRL_RING_REF, netif.KEY_EVENT_CHANNEL_CTRL)
    if not any(front.has(name) for name in names):
        return None
    return ControlKeys(*(front.int_key(name, None, 1, 0xFFFFFFFF) for name in names))


class Control:
    """What one control ring holds on to, beside its QueueState."""

    def __init__(self, device: VifBackend, keys: ControlKeys, queues: int, *, recover: bool) -> None:
        """Raises PvError when there is no room for its file."""
        uuid = device.context.platform.domain_uuid(device.ident.domid)
        whose = f"{device.ident} {uuid} {keys.gref} {keys.port} {queues}"
        self.hashes = device.kept.open("hash", HASHES, whose, recover=recover).address
        self.record = np.zeros(1, CONTROL)
        self._memory = Memory(2 * 4096)
        assert device.spec is not None
        self.staging = Staging(device, queues, offer(device, queues, device.spec.staging))
        row = self.record[0]
        row["hashes"], row["queues"] = self.hashes, queues
        row["worker"] = device.queues[-1].worker.address
        row["payload"], row["stages"] = self._memory.address, self.staging.address
        row["request"], row["response"] = self._memory.address + 4096, self._memory.address + 4096 + 64

    @property
    def address(self) -> int:
        """The address of the CONTROL."""
        return int(self.record.ctypes.data)


@dataclass
class _Release:
    """As a mapping is given back, so are those that the guest has asked for."""

    control: Control

    def unmap(self) -> None:
        self.control.staging.release()


def attach_control(device: VifBackend, keys: ControlKeys, state: QueueState, recover: bool) -> None:
    """Map it, bind its port, fill in its RING. The worker is not told yet.

    Raises ProtocolViolation for indices that no ring can have, PlatformError for a page or a port that is not there.
    """
    assert device.counters is not None
    domid, worker = device.ident.domid, state.worker
    control = Control(device, keys, len(device.queues) - 1, recover=recover)
    # Before what may fail: whatever it has set aside or mapped is given back with the others.
    state.mappings.append(_Release(control))
    state.mappings.append(device.context.platform.grants.map(domid, [keys.gref]))
    state.tx_port = state.rx_port = worker.events.bind_interdomain(domid, keys.port)
    handle = worker.new_ring(device, state.tx_port)
    state.handles.append(handle)
    end = np.zeros(1, ringlib.RING_END)
    state.keep += [end, control]
    size = netif.CTRL_ENTRY_SIZE
    if ringlib.back_end(end.ctypes.data, state.mappings[1].address, RING_SLOTS, size) == ringlib.CORRUPT:
        raise ProtocolViolation(domid, str(device.ident), "control ring: indices that no ring can have")
    row = handle.record
    row["step"], row["finish"] = address_of(control_ring.step_control), address_of(queue.finish)
    row["end"], row["device"], row["priv"] = end.ctypes.data, device.port.address, control.address
    row["nr_ents"], row["entry_size"], row["domid"] = RING_SLOTS, size, domid
    row["local"] = state.shard.address
    row["stats"] = device.counters.address(0)
    use_answers(device, handle, 2 * (len(device.queues) - 1), recover)
    device.port.record[0]["hashes"] = control.hashes
    for q, other in enumerate(device.queues[:-1]):
        other.queue[0]["stage"] = control.staging.at(q)
