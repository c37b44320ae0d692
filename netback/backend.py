"""The network backend's control side: what is advertised, what the frontend's keys may say, rings for the worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pvdrivers.capture_memory import CaptureMemory, point_to
from pvdrivers.device import Context, Device, DeviceId, FrontKeys, NotYet, Publish
from pvdrivers.errors import ConfigError
from pvdrivers.migration import guest_of
from pvdrivers.stats import StatsFile
from pvdrivers.worker.control import RingHandle, Worker
from pvdrivers.worker.pool import WorkerPool
from pvdrivers.worker.records import V_CLASS
from pvdrivers.worker.words import store_word
from rings import netif

from .attach import attach_ring, keep_answers, wake_guest
from .control_attach import ControlKeys, attach_control, parse_control
from .groups import keep_groups
from .kept_file import KeptFiles
from .live import carrier, forget_live, hold_to_keys, live_before, wants_filter
from .other_side import OtherSide
from .params import LiveSpec, VifSpec, live_of, vif_of
from .records import (
    ACCEPTS_CSUM4,
    ACCEPTS_CSUM6,
    ACCEPTS_GSO4,
    ACCEPTS_GSO6,
    ACCEPTS_SG,
    CAPTURE_AT,
    FAULTS,
    HEADROOM_AT,
    KIND_NAMES,
    MAX_QUEUES,
    MOST_HEADROOM,
    PORT_VIF,
    RX_QUEUE,
)
from .shards import Shard
from .switch import AddressTaken, Port, Switch, find_switch
from .uplinks import uplinks_of

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
    control: ControlKeys | None = None
    headroom: int = 0


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
    notifies, filters = front.flag(netif.KEY_RX_NOTIFY), front.flag(netif.KEY_REQUEST_MCAST)
    out = Front(accepts, notifies, filters, headroom=headroom_of(front))
    for q in range(n):
        keys = front.queue(q) if n > 1 else front
        tx, rx = (keys.int_key(name, None, 1, 0xFFFFFFFF) for name in (netif.KEY_TX_RING_REF, netif.KEY_RX_RING_REF))
        if keys.has(netif.KEY_EVENT_CHANNEL_TX) or keys.has(netif.KEY_EVENT_CHANNEL_RX):
            names = (netif.KEY_EVENT_CHANNEL_TX, netif.KEY_EVENT_CHANNEL_RX)
        else:
            names = (netif.KEY_EVENT_CHANNEL, netif.KEY_EVENT_CHANNEL)
        tx_port, rx_port = (keys.int_key(name, None, 1, 0xFFFFFFFF) for name in names)
        out.queues.append(QueueKeys(tx, rx, tx_port, rx_port))
    grefs = [gref for q in out.queues for gref in (q.tx_gref, q.rx_gref)]
    ports = [{q.tx_port, q.rx_port} for q in out.queues]
    out.control = parse_control(front)
    if out.control is not None:
        grefs.append(out.control.gref)
        ports.append({out.control.port})
    if len(set(grefs)) != len(grefs) or len(set().union(*ports)) != sum(map(len, ports)):
        raise front.violation("two rings name the same page, or two queues the same event channel")
    return out


def headroom_of(front: FrontKeys) -> int:
    """Bytes that the frontend wants free before its packets. Raises ProtocolViolation."""
    return front.int_key(netif.KEY_REQUEST_XDP_HEADROOM, 0, 0, MOST_HEADROOM)


class VifBackend(Device):
    """One network interface of one guest."""

    violations = {V_CLASS + number: text for number, text in FAULTS.items()}
    live_keys = (netif.KEY_REQUEST_MCAST,)

    def __init__(self, ident: DeviceId, context: Context) -> None:
        super().__init__(ident, context)
        self.spec: VifSpec | None = None
        self.live = LiveSpec()
        self.port = Port(str(ident))
        self.switch: Switch | None = None
        self.other_side = OtherSide(str(ident), context)
        self.counters: StatsFile | None = None
        self.queues: list[QueueState] = []  # the last may be the control ring's
        self.kept = KeptFiles(context.run_dir, str(ident))
        self.groups_known = True
        """Else nothing is filtered until the guest connects anew."""

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """The uplinks."""
        uplinks_of(options)

    def advertise(self) -> Publish:
        """What netif.h wants to see before InitWait."""
        self.spec, errors = vif_of(self.params, OFFERED_QUEUES)
        self.live, wrong = live_of(self.params, LiveSpec())
        if errors + wrong or self.spec is None:
            raise ConfigError("; ".join(errors + wrong))
        self._tell([])
        self.other_side.open(self.spec.port, self.live.mtu, self.params)
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
            netif.KEY_CTRL_RING: 1,
            netif.KEY_XDP_HEADROOM: 1,
        }

    def reopen(self) -> None:
        """What was good enough to connect the guest is so still: what would not be advertised any more is told by
        connect(), and served all the same. Only where its packets go has to be known."""
        self.spec, errors = vif_of(self.params, OFFERED_QUEUES)
        if self.spec is None:
            raise ConfigError("; ".join(errors))
        self.live, _ = live_of(self.params, live_before(self))
        self.other_side.open(self.spec.port, self.live.mtu, self.params, served=True)

    def connect(self, front: FrontKeys, *, recover: bool) -> Publish:
        """Check the keys, map the rings, bind the ports, join the switch, and have its worker serve them.

        There is nothing to recover but the rings themselves, and answers that were on their way there: see `answers`.
        """
        assert self.spec is not None
        self._release()
        # Of one that is served already `queues` may say less by now: that holds from its next connection on.
        said = parse_front(front, OFFERED_QUEUES if recover else self.spec.queues)
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
        if self.spec.port.kind == "switch":
            self.switch = find_switch(pool, self.spec.port.name)
        else:
            workers = pool.choose(min(len(said.queues), len(pool.workers)))
            self.switch = Switch(str(self.ident), workers, wire=True)
        self.switch.settle(self.port, len(said.queues))
        self.port.mac, self.port.vlan, self.port.trunk = self.spec.mac, self.spec.port.vlan, self.spec.port.trunk
        if self.port.trunk is not None:
            # A guest knows no blank checksum, and no segments, behind a tag (Linux: skb_checksum_setup).
            said.accepts &= ACCEPTS_SG
        row = self.port.record[0]
        row["kind"], row["domid"], row["accepts"] = PORT_VIF, domid, said.accepts
        row["handed_over"] = row["n_out"] = row["stalled"] = row["hashes"] = row["amending"] = 0
        row["headroom"] = said.headroom
        self.groups_known = keep_groups(self, said, recover)
        keep_answers(self, said, recover)
        row["notifies"], row["filters"] = said.notifies, said.filters and self.groups_known
        errors = hold_to_keys(self, OFFERED_QUEUES)
        for q, keys in enumerate(said.queues):
            state = QueueState(self.switch.shard_of(self.port, q))
            self.queues.append(state)
            for gref in (keys.tx_gref, keys.rx_gref):
                state.mappings.append(platform.grants.map(domid, [gref]))
            state.tx_port = state.rx_port = state.worker.events.bind_interdomain(domid, keys.tx_port)
            if keys.rx_port != keys.tx_port:
                state.rx_port = -1
                state.rx_port = state.worker.events.bind_interdomain(domid, keys.rx_port)
            row["out"][q] = attach_ring(self, state, q, tx=False, recover=recover).address
            attach_ring(self, state, q, tx=True, recover=recover)
        if said.control is not None:
            self.queues.append(QueueState(self.switch.shard_of(self.port, 0)))
            attach_control(self, said.control, self.queues[-1], recover)
        self._join(self.switch)
        self.other_side.attach(self.switch, len(said.queues), said.accepts, self)
        for state in self.queues:
            if recover:
                wake_guest(state)
            for handle in state.handles:
                state.worker.attach(handle)
                state.attached.append(handle)
        row["n_out"] = len(said.queues)
        self._tell(errors + self.other_side.look_again(self.live.mtu))

    def _join(self, switch: Switch) -> None:
        try:
            switch.join(self.port)
        except AddressTaken as e:
            store = self.context.platform.store
            guest = guest_of(store, self.ident.domid)
            if not guest or e.domid == self.ident.domid or guest_of(store, e.domid) != guest:
                raise
            raise NotYet(f"it waits for domain {e.domid}, where the guest comes from, to let go of its address",
                         0.05) from None  # fmt: skip

    def _tell(self, errors: list[str]) -> None:
        self.wrong, self.lost = "; ".join(errors), self.other_side.lost

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
        """What has changed: the toolstack's rate, MTU, link and time-outs; the guest's wish for a filter; whether it
        has stalled. If what is on the other side is gone, it is made again. What of this fails is told, and keeps
        nothing else from being done; nothing that a guest has written does."""
        errors = hold_to_keys(self, OFFERED_QUEUES)
        if self.groups_known:
            self.port.record[0]["filters"] = wants_filter(self.context.platform.store, self.ident)
        if self.switch is not None:
            for worker in self._workers():
                worker.ring_doorbell()  # who waits for a slow rate waits for another now
        self._tell(errors + self.other_side.look_again(self.live.mtu))
        return carrier(self.port)

    def reconfigure(self) -> Publish | None:
        """The guest's headroom: Reconfiguring is for nothing else, as in Linux."""
        said = FrontKeys.read(self.context.platform.store, self.ident)
        store_word(self.port.address + HEADROOM_AT, headroom_of(said))
        return None

    def disconnect(self) -> None:
        """Leave the switch, take the rings from the worker, unmap, unbind."""
        self._release()
        self.kept.forget()
        forget_live(self)

    def hand_over(self) -> None:
        """The guest goes on with the next process, which finds on the rings whatever was not answered."""
        self.port.record[0]["handed_over"] = 1
        self._release()
        self.other_side.close()
        if self.counters is not None:
            self.counters.remove()
            self.counters = None

    def removed(self) -> None:
        """The vif has been detached: nothing of it is left, nor of a process that served it before this one."""
        self.other_side.close(delete=True)
        self.counters = None
        for name in (str(self.ident), f"{self.ident}.port"):
            (self.context.run_dir / "stats" / name).unlink(missing_ok=True)
        self.kept.forget()
        forget_live(self)

    def capture(self, memory: CaptureMemory | None) -> None:
        """Have its packets captured; None: no more, and when this returns nobody does."""
        point_to(self.port.address + CAPTURE_AT, memory, self._workers())

    def _workers(self) -> list[Worker]:
        """All that have to do with it."""
        switch = self.switch  # it may leave meanwhile
        return [] if switch is None else [shard.worker for shard in switch.shards]

    def port_lost(self, error: int) -> str:
        """What is on the other side is gone: in words."""
        return self.other_side.gone(error)

    def _release(self) -> None:
        if self.switch is not None:
            self.port.record[0]["n_out"] = 0
            self.switch.leave(self.port)
            if not any(state.attached for state in self.queues):
                self.switch.come_round()  # there is no ring to wait for, and a pass that knows it may be under way
            self.other_side.detach()
        for state in self.queues:
            for handle in state.handles:
                if handle in state.attached:
                    state.worker.detach(handle)
                else:
                    state.worker.drop(handle)
        for state in self.queues:
            self._release_queue(state)
        self.queues = []
        if self.switch is not None:
            self.switch.close()
        self.switch = None
        self.port.use_groups(None)
        self.port.record[0]["hashes"] = 0
        self.kept.close()

    def _release_queue(self, state: QueueState) -> None:
        ports = sorted({state.tx_port, state.rx_port} - {-1})
        undo: list[Callable[[], None]] = [partial(state.worker.events.unbind, port) for port in ports]
        undo += [mapping.unmap for mapping in state.mappings]
        self.undo(undo)
        state.keep = []


@dataclass
class QueueState:
    """What one queue holds on to, in the order in which it was got."""

    shard: Shard
    """Of the switch, and so of a worker."""
    mappings: list[Any] = field(default_factory=list)
    tx_port: int = -1
    rx_port: int = -1
    handles: list[RingHandle] = field(default_factory=list)
    attached: list[RingHandle] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)
    queue: np.ndarray = field(default_factory=lambda: np.zeros(1, RX_QUEUE))
    """Its RX_QUEUE."""

    @property
    def worker(self) -> Worker:
        """Whose it is."""
        return self.shard.worker


def warm() -> None:
    """Compile all that serves a vif, before the first InitWait."""
    from . import attach, inbox, port_in, queue, staging_share

    attach.warm()
    staging_share.warm()
    del inbox, port_in, queue


assert OFFERED_QUEUES <= MAX_QUEUES
