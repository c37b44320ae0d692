"""The network backend's control side: what is advertised, what the frontend's keys may say, rings for the worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pvdrivers.device import Context, Device, DeviceId, FrontKeys, Publish
from pvdrivers.stats import StatsFile
from pvdrivers.worker.control import RingHandle, Worker, WorkerPool
from pvdrivers.worker.records import V_CLASS
from rings import netif

from .attach import attach_ring, wake_guest
from .live import apply, carrier, wants_filter
from .params import VifSpec, live_of, vif_of
from .records import (
    ACCEPTS_CSUM4,
    ACCEPTS_CSUM6,
    ACCEPTS_GSO4,
    ACCEPTS_GSO6,
    ACCEPTS_SG,
    FAULTS,
    KIND_NAMES,
    MAX_QUEUES,
    PORT_VIF,
    RX_QUEUE,
)
from .switch import Port, Switch, find_switch

OFFERED_QUEUES = 8
"""As many as Linux's netback offers (xenvif_max_queues), at the most."""


@dataclass
class QueueKeys:
    """What the frontend says of one queue: checked numbers, nothing else."""

    tx_gref: int
    rx_gref: int
    tx_port: int
    rx_port: int


@dataclass
class Front:
    """What the frontend says of the vif: checked. `accepts` is ACCEPTS_*; it `notifies` when it posts buffers, and
    `filters` what is sent to groups."""

    accepts: int
    notifies: bool
    filters: bool
    queues: list[QueueKeys] = field(default_factory=list)


def parse_front(front: FrontKeys, most_queues: int) -> Front:
    """The frontend's keys (netif.h), each held against what was offered. Raises ProtocolViolation.

    Absent: one queue with flat keys; checksums of IPv4 are finished by the guest, those of IPv6 not; no chains, no GSO.
    """
    n = front.int_key(netif.KEY_NUM_QUEUES, 1, 1, most_queues)
    if not front.flag(netif.KEY_REQUEST_RX_COPY):
        raise front.violation(
            f"frontend key {netif.KEY_REQUEST_RX_COPY} is not 1: packets are copied into its pages, and not flipped"
        )
    accepts = 0
    for key, bit in (
        (netif.KEY_SG, ACCEPTS_SG),
        (netif.KEY_IPV6_CSUM, ACCEPTS_CSUM6),
        (netif.KEY_GSO_TCPV4, ACCEPTS_GSO4),
        (netif.KEY_GSO_TCPV6, ACCEPTS_GSO6),
    ):
        accepts |= bit if front.flag(key) else 0
    accepts |= 0 if front.flag(netif.KEY_NO_CSUM) else ACCEPTS_CSUM4
    out = Front(accepts, front.flag(netif.KEY_RX_NOTIFY), front.flag(netif.KEY_REQUEST_MCAST))
    for q in range(n):
        keys = front.queue(q) if n > 1 else front
        tx, rx = (keys.int_key(name, None, 1, 0xFFFFFFFF) for name in (netif.KEY_TX_RING_REF, netif.KEY_RX_RING_REF))
        if keys.has(netif.KEY_EVENT_CHANNEL_TX) or keys.has(netif.KEY_EVENT_CHANNEL_RX):
            names = (netif.KEY_EVENT_CHANNEL_TX, netif.KEY_EVENT_CHANNEL_RX)
        else:
            names = (netif.KEY_EVENT_CHANNEL, netif.KEY_EVENT_CHANNEL)
        tx_port, rx_port = (keys.int_key(name, None, 1, 0xFFFFFFFF) for name in names)
        out.queues.append(QueueKeys(tx, rx, tx_port, rx_port))
    grefs = {gref for q in out.queues for gref in (q.tx_gref, q.rx_gref)}
    ports = [{q.tx_port, q.rx_port} for q in out.queues]
    if len(grefs) != 2 * n or len(set().union(*ports)) != sum(map(len, ports)):
        raise front.violation("two rings name the same page, or two queues the same event channel")
    return out


class VifBackend(Device):
    """One network interface of one guest."""

    violations = {V_CLASS + number: text for number, text in FAULTS.items()}
    live_keys = (netif.KEY_REQUEST_MCAST,)

    def __init__(self, ident: DeviceId, context: Context) -> None:
        super().__init__(ident, context)
        self.spec: VifSpec | None = None
        self.port = Port(str(ident))
        self.switch: Switch | None = None
        self.counters: StatsFile | None = None
        self.queues: list[QueueState] = []
        self.groups_lost = False
        """A process that ended had its list of groups: nothing is filtered until the guest connects anew."""

    def advertise(self) -> Publish:
        """What netif.h wants to see before InitWait."""
        self.spec = vif_of(self.params, OFFERED_QUEUES)
        live_of(self.params)
        return {
            netif.KEY_SG: 1,
            netif.KEY_GSO_TCPV4: 1,
            netif.KEY_GSO_TCPV6: 1,
            netif.KEY_IPV6_CSUM: 1,
            netif.KEY_RX_COPY: 1,
            netif.KEY_RX_FLIP: 0,
            netif.KEY_SPLIT_EVENTS: 1,
            netif.KEY_MCAST: 1,
            netif.KEY_DYNAMIC_MCAST: 1,
            netif.KEY_MAX_QUEUES: self.spec.queues,
        }

    def connect(self, front: FrontKeys, *, recover: bool) -> Publish:
        """Check the keys, map the rings, bind the ports, join the switch, and have its worker serve them.

        There is nothing to recover but the rings themselves: see `queue`.
        """
        assert self.spec is not None
        self.disconnect()
        said = parse_front(front, self.spec.queues)
        try:
            self._connect_queues(said, recover)
        except BaseException:
            self._release()
            raise
        return carrier(self.port)

    def _connect_queues(self, said: Front, recover: bool) -> None:
        platform, pool = self.context.platform, self.context.workers
        assert isinstance(pool, WorkerPool) and self.spec is not None
        domid = self.ident.domid
        platform.prepare(domid)
        self._count(said, recover)
        name = self.spec.port.name
        self.switch = find_switch(pool, name) if name else Switch(str(self.ident), pool.choose(1)[0])
        self.port.mac = self.spec.mac
        row = self.port.record[0]
        row["kind"], row["domid"], row["accepts"] = PORT_VIF, domid, said.accepts
        row["handed_over"] = row["n_out"] = row["stalled"] = row["n_groups"] = 0
        self.groups_lost = recover
        row["notifies"], row["filters"] = said.notifies, said.filters and not recover
        apply(self.port, live_of(self.params))
        for q, keys in enumerate(said.queues):
            state = QueueState(self.switch.worker)
            self.queues.append(state)
            for gref in (keys.tx_gref, keys.rx_gref):
                state.mappings.append(platform.grants.map(domid, [gref]))
            state.tx_port = state.rx_port = state.worker.events.bind_interdomain(domid, keys.tx_port)
            if keys.rx_port != keys.tx_port:
                state.rx_port = -1
                state.rx_port = state.worker.events.bind_interdomain(domid, keys.rx_port)
            row["out"][q] = attach_ring(self, state, q, tx=False).address
            attach_ring(self, state, q, tx=True)
        self.switch.join(self.port)
        for state in self.queues:
            if recover:
                wake_guest(state)
            for handle in state.handles:
                state.worker.attach(handle)
                state.attached.append(handle)
        row["n_out"] = len(self.queues)

    def _count(self, said: Front, recover: bool) -> None:
        assert self.spec is not None
        about = {
            "device": str(self.ident),
            "domid": self.ident.domid,
            "uri": str(self.spec.port),
            "policy": "copy",
            "kinds": KIND_NAMES,
            "recovered": recover,
        }
        violations = 0 if self.counters is None else int(self.counters.queues["violations"].sum())
        self.counters = StatsFile(self.context.run_dir / "stats" / str(self.ident), about, len(said.queues))
        self.counters.queues[0]["violations"] = violations

    def refresh(self) -> Publish | None:
        """The toolstack's rate, MTU, link and time-outs; the guest's wish for a filter; and whether it has stalled."""
        apply(self.port, live_of(self.params))
        if not self.groups_lost:
            self.port.record[0]["filters"] = wants_filter(self.context.platform.store, self.ident)
        if self.switch is not None:
            self.switch.worker.ring_doorbell()  # who waits for a slow rate waits for another now
        return carrier(self.port)

    def disconnect(self) -> None:
        """Leave the switch, take the rings from the worker, unmap, unbind."""
        self._release()

    def hand_over(self) -> None:
        """The guest goes on with the next process, which finds on the rings whatever was not answered."""
        self.port.record[0]["handed_over"] = 1
        self._release()
        if self.counters is not None:
            self.counters.remove()
            self.counters = None

    def removed(self) -> None:
        """The vif has been detached."""
        if self.counters is not None:
            self.counters.remove()
            self.counters = None

    def _release(self) -> None:
        if self.switch is not None:
            self.port.record[0]["n_out"] = 0
            self.switch.leave(self.port)
        for state in self.queues:
            for handle in state.handles:
                if handle in state.attached:
                    state.worker.detach(handle)
                else:
                    state.worker.drop(handle)
        for state in self.queues:
            self._release_queue(state)
        self.queues = []
        self.switch = None

    def _release_queue(self, state: QueueState) -> None:
        ports = sorted({state.tx_port, state.rx_port} - {-1})
        undo: list[Callable[[], None]] = [partial(state.worker.events.unbind, port) for port in ports]
        undo += [mapping.unmap for mapping in state.mappings]
        self.undo(undo)
        state.keep = []


@dataclass
class QueueState:
    """What one queue holds on to, in the order in which it was got."""

    worker: Worker
    mappings: list[Any] = field(default_factory=list)
    tx_port: int = -1
    rx_port: int = -1
    handles: list[RingHandle] = field(default_factory=list)
    attached: list[RingHandle] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)
    queue: np.ndarray = field(default_factory=lambda: np.zeros(1, RX_QUEUE))
    """Its RX_QUEUE."""


def warm() -> None:
    """Compile all that serves a vif, before the first InitWait."""
    from . import attach, queue

    attach.warm()
    del queue


assert OFFERED_QUEUES <= MAX_QUEUES
