"""The block backend's control side: what is advertised, what the frontend's keys may say, rings for the workers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pvdrivers.device import Context, Device, DeviceId, FrontKeys, NotRecoverable, NotYet, Publish
from pvdrivers.errors import ConfigError, DeviceBusyError
from pvdrivers.journal import Journal, left_behind
from pvdrivers.stats import StatsFile
from pvdrivers.storage.store import Store, memory_name, open_store, place_of
from pvdrivers.storage.uri import DiskSpec
from pvdrivers.worker.control import RingHandle, Worker
from pvdrivers.worker.pool import WorkerPool
from pvdrivers.worker.records import POLICIES, POLICY_COPY, POLICY_MAP, POLICY_PERSISTENT
from pvdrivers.xenbus import XenbusState
from rings import blkif
from rings.ring import ring_entries

from .attach import attach_queue, detach_queue, drop_grants, format_disk
from .pages import Plan, plans, set_aside
from .params import awaits_block, disk_of, script_of
from .records import DISK, MAX_QUEUES, disk_policy
from .sharing import migrates_from

log = logging.getLogger(__name__)

_DRAIN_SECONDS = 5.0
"""How long an attempt to open a disk waits for I/O of a process that has ended, before that is told and tried again."""


@dataclass
class QueueKeys:
    """What the frontend says of one queue: checked numbers, nothing else."""

    grefs: list[int]
    port: int


@dataclass
class Front:
    """What the frontend says of the device: checked."""

    protocol: str
    abi: int
    order: int
    persistent: bool
    queues: list[QueueKeys] = field(default_factory=list)

    @property
    def nr_ents(self) -> int:
        """Slots in each ring."""
        return ring_entries(4096 << self.order, blkif.ENTRY_SIZE[self.abi])

    def incarnation(self, uuid: str, ident: DeviceId) -> str:
        """What a journal must match: this guest, this device, these very rings."""
        rings = ";".join(f"{','.join(map(str, q.grefs))}@{q.port}" for q in self.queues)
        text = f"{uuid}|{ident}|{self.protocol}|{self.persistent}|{rings}"
        if len(text) > 500:  # many queues of many pages
            import hashlib

            text = f"{uuid}|{ident}|{hashlib.sha256(text.encode()).hexdigest()}"
        return text


def parse_front(front: FrontKeys, spec: DiskSpec) -> Front:
    """The frontend's keys (blkif.h, "Frontend XenBus Nodes"), each held against what was offered.

    Raises ProtocolViolation. An absent `protocol` is x86_32 on x86; an absent ring-page-order means one page at
    `ring-ref`, a present one `ring-ref%u` even for order 0 (Linux, QEMU), with `ring-ref` as what FreeBSD writes then.
    """
    n = front.int_key(blkif.KEY_NUM_QUEUES, 1, 1, min(spec.queues, MAX_QUEUES))
    protocol = front.str_key(blkif.KEY_PROTOCOL, "", max_length=32)
    try:
        abi = blkif.abi_of(protocol or None)
    except ValueError as e:
        raise front.violation(f"frontend key {e}") from None
    numbered = front.has(blkif.KEY_RING_PAGE_ORDER)
    order = front.int_key(blkif.KEY_RING_PAGE_ORDER, 0, 0, spec.ring_order)
    persistent = front.flag(blkif.KEY_PERSISTENT)
    out = Front(protocol, abi, order, persistent)
    for q in range(n):
        keys = front.queue(q) if n > 1 else front
        if numbered and (order > 0 or keys.has(blkif.KEY_RING_REF + "0")):
            names = [f"{blkif.KEY_RING_REF}{i}" for i in range(1 << order)]
        else:
            names = [blkif.KEY_RING_REF]
        grefs = [keys.int_key(name, None, 1, 0xFFFFFFFF) for name in names]
        if len(set(grefs)) != len(grefs):
            raise front.violation(f"queue {q} names a page of its ring twice")
        port = keys.int_key(blkif.KEY_EVENT_CHANNEL, None, 1, 0xFFFFFFFF)
        out.queues.append(QueueKeys(grefs, port))
    if len({q.port for q in out.queues}) != n or len({g for q in out.queues for g in q.grefs}) != n << order:
        raise front.violation("two queues name the same page or the same event channel")
    return out


class BlkBackend(Device):
    """One disk of one guest."""

    def __init__(self, ident: DeviceId, context: Context) -> None:
        super().__init__(ident, context)
        self.store: Store | None = None
        self.spec: DiskSpec | None = None
        self.journal: Journal | None = None
        self.counters: StatsFile | None = None
        self.said_of_pages = ""
        """What the log has of a budget that its pages do not fit into."""
        self.disk = np.zeros(1, DISK)
        self.queues: list[QueueState] = []
        self.plan = Plan(POLICY_MAP)
        self.grant_pages: int | None = None
        self._recover = False
        self._fresh = False  # this process has begun with another disk: nothing is to be taken over

    @classmethod
    def pages_mapped(cls) -> dict[str, int]:
        """Of a ring of one page, as Linux's frontend has it."""
        slots = ring_entries(4096, blkif.ENTRY_SIZE[blkif.ABI_64])
        return {
            name: plans(policy, slots, DiskSpec("").indirect, limited=True)[0].pages(1, 0)
            for name, policy in POLICIES.items()
        }

    @property
    def journal_path(self) -> Path:
        """Where this device's journal is."""
        return self.context.run_dir / "journal" / self._identity

    @property
    def _identity(self) -> str:
        return f"{self.ident.backend_domid}-{self.ident}"

    def advertise(self) -> Publish:
        """Open the store; what blkif.h wants to see before InitWait.

        Two kinds of disk are opened by connect(): one whose hotplug script runs after InitWait, and one that the domain
        which this guest migrates from still has.
        """
        self._recover = self._served_before()
        if not self._recover:
            self._begin_anew()  # attached in the place of the one that is open: not the same, even by the same name
        spec = disk_of(self.params)
        if self.store is not None and self.store.spec != spec:
            self._begin_anew()
        if self.store is None and spec is not None:
            try:
                self._open(spec)
            except DeviceBusyError:
                domid = migrates_from(self.context.platform.store, self.ident, spec)
                if domid is None:
                    raise
                log.info("%s: %s is with domain %d, where the guest comes from", self.ident, spec.uri, domid)
        self.spec = spec or DiskSpec("")
        out: Publish = {
            blkif.KEY_MAX_RING_PAGE_ORDER: self.spec.ring_order,
            blkif.KEY_MAX_QUEUES: min(self.spec.queues, MAX_QUEUES),
        }
        if self.spec.indirect > 0:
            out[blkif.KEY_MAX_INDIRECT_SEGMENTS] = self.spec.indirect
        return out

    def reopen(self) -> None:
        """Raises ConfigError if it is to be another disk than the one that the guest has: what is in the journal, and
        in the guest's memory, is of that one."""
        place = place_of(disk_of(self.params))
        if place and (had := left_behind(self.journal_path, place)) is not None:
            raise ConfigError(
                f"{self.ident}: {self.ident.backend_path} names {place}, and its guest is connected to {had},"
                " with I/O that may not be finished: write that again and it goes on, or detach the disk"
            )
        self.advertise()

    def _begin_anew(self) -> None:
        """Let go of a disk that is open, and is not the one that the toolstack asks for now."""
        if self.store is not None:
            self.store.close(final=True)
            self.store = None
        self._fresh = True

    def _open(self, spec: DiskSpec) -> None:
        pool = self.context.workers
        assert isinstance(pool, WorkerPool)
        self.store = open_store(
            spec,
            run_dir=self.context.run_dir,
            identity=self._identity,
            recover=self._recover and not self._fresh,
            timeout=_DRAIN_SECONDS,
            fence=pool.fence,
        )
        log.info("%s: %s", self.ident, self.store.describe())

    def _open_late(self) -> None:
        """Open what could not be opened before InitWait. Raises NotYet while that is so."""
        spec = disk_of(self.params)
        if spec is None:
            raise NotYet(f"it waits for the hotplug script {script_of(self.params)} to write physical-device-path")
        try:
            self._open(spec)
        except DeviceBusyError:
            domid = migrates_from(self.context.platform.store, self.ident, spec)
            if domid is None:
                raise
            raise NotYet(f"it waits for domain {domid}, where the guest comes from, to let go of {spec.uri}",
                         0.05) from None  # fmt: skip
        self.spec = spec

    def _served_before(self) -> bool:
        """Whether this very disk was served by a process that has ended: then its I/O is waited for, and what it kept
        in memory is taken over. A fresh device starts as Initialising, whatever an earlier guest left behind."""
        return self.params.int_key("state", 0, 0, 8) > XenbusState.Initialising

    def connect(self, front: FrontKeys, *, recover: bool) -> Publish:
        """Check the keys, map the rings, bind the ports, and have workers serve them."""
        assert self.spec is not None
        if awaits_block(self.params):
            raise NotYet("it waits for the hotplug script block to write physical-device-path")
        if self.store is None:
            self._open_late()
        assert self.store is not None
        self.store.refresh_size()  # it may have been resized since it was opened
        if recover and not self.context.options.get("journal", True):
            raise NotRecoverable(f"{self.ident}: there is no journal to recover from (--no-journal)")
        self.disconnect()
        said = parse_front(front, self.spec)
        late = self.context.platform.late_unmap and self.store.direct
        policy = disk_policy(self.spec.policy, said.persistent, unmap_too_late=late)
        format_disk(self.disk, self.spec, self.store, said.abi, self.params.flag("discard-enable", True))
        try:
            self.plan, self.grant_pages = set_aside(self, policy, said)
            self._connect_queues(said, recover)
        except BaseException:
            self._release(keep=recover)
            raise
        return self._properties()

    def _connect_queues(self, said: Front, recover: bool) -> None:
        platform, pool = self.context.platform, self.context.workers
        assert isinstance(pool, WorkerPool)
        domid = self.ident.domid
        platform.prepare(domid)
        uuid = platform.domain_uuid(domid)
        incarnation = said.incarnation(uuid, self.ident)
        sizes = [said.nr_ents] * len(said.queues)
        use_file = bool(self.context.options.get("journal", True))
        if recover:
            self.journal = Journal.open(self.journal_path, incarnation, sizes)
            if self.journal is None:
                raise NotRecoverable(f"{self.ident}: its journal is missing or of another incarnation")
        else:
            if use_file:
                self.journal_path.parent.mkdir(mode=0o700, exist_ok=True)
            path = self.journal_path if use_file else None
            self.journal = Journal.create(path, incarnation, sizes, place_of(self.spec))
        about = {
            "device": str(self.ident),
            "domid": domid,
            "uuid": uuid,
            "uri": self.spec.uri if self.spec else "",
            "policy": {POLICY_MAP: "map", POLICY_PERSISTENT: "persistent", POLICY_COPY: "copy"}[self.plan.policy],
            "grant_pages": self.grant_pages,
            "protocol": said.protocol,
            "ring_order": said.order,
            "journal": str(self.journal_path) if use_file else "",
            "recovered": recover,
        }
        violations = 0 if self.counters is None else int(self.counters.queues["violations"].sum())
        self.counters = StatsFile(self.context.run_dir / "stats" / str(self.ident), about, len(said.queues))
        self.counters.queues[0]["violations"] = violations
        for q, (keys, worker) in enumerate(zip(said.queues, pool.choose(len(said.queues)))):
            state = QueueState(worker)
            self.queues.append(state)
            state.mapping = platform.grants.map(domid, keys.grefs)
            state.port = worker.events.bind_interdomain(domid, keys.port)
            attach_queue(self, state, q, said, recover)
        self.disk[0]["n_rings"] = len(self.queues)
        for q, state in enumerate(self.queues):
            assert state.handle is not None
            self.disk[0]["rings"][q] = state.handle.address
        for state in self.queues:
            assert state.handle is not None
            state.worker.attach(state.handle)

    def _properties(self) -> Publish:
        """What blkif.h wants to see with Connected."""
        store, spec, disk = self.store, self.spec, self.disk[0]
        assert store is not None and spec is not None
        shift = int(disk["unit_shift"])
        info = blkif.VDISK_READONLY if store.readonly else 0
        info |= blkif.VDISK_CDROM if spec.cdrom else 0
        removable = spec.removable or self.params.flag("removable")
        info |= blkif.VDISK_REMOVABLE if removable else 0
        out: Publish = {
            blkif.KEY_SECTORS: store.sectors >> shift,
            blkif.KEY_INFO: info,
            blkif.KEY_SECTOR_SIZE: store.sector_size,
            blkif.KEY_PHYSICAL_SECTOR_SIZE: store.physical_sector_size,
            blkif.KEY_FLUSH: int(disk["can_flush"]),
            blkif.KEY_BARRIER: int(disk["can_barrier"]),
            blkif.KEY_PERSISTENT: int(spec.persistent),
            blkif.KEY_DISCARD: int(disk["can_discard"]),
        }
        if disk["can_discard"]:
            out[blkif.KEY_DISCARD_GRANULARITY] = store.discard_granularity
            out[blkif.KEY_DISCARD_ALIGNMENT] = store.discard_alignment
            out[blkif.KEY_DISCARD_SECURE] = int(disk["can_secure"])
        return out

    def disconnect(self) -> None:
        """Drain, unmap, unbind; nothing is left to recover."""
        self._release(keep=False)

    def hand_over(self) -> None:
        """Drain, but leave the journal: a successor finds at most what had not begun, and goes on."""
        self.disk[0]["handed_over"] = 1
        self._release(keep=True)
        if self.store is not None:
            self.store.close()
            self.store = None

    def _release(self, *, keep: bool) -> None:
        for state in self.queues:
            if state.handle is not None:
                detach_queue(state)
        for state in self.queues:
            self._release_queue(state)
        self.queues = []
        self.context.budget.give_back(str(self.ident))
        if self.journal is not None:
            if not keep:
                self.journal.erase()
            self.journal.close()
            self.journal = None
        if self.counters is not None and keep:
            self.counters.remove()  # or it stays until the next connection: what broke this one is in it
            self.counters = None

    def _release_queue(self, state: QueueState) -> None:
        undo: list[Callable[[], None]] = [lambda: drop_grants(state)]
        if state.port >= 0:
            undo.append(lambda: state.worker.events.unbind(state.port))
        if state.mapping is not None:
            undo.append(state.mapping.unmap)
        self.undo(undo)
        state.keep = []

    def refresh(self) -> Publish | None:
        """Live resize: the store has another size than the guest was told."""
        if self.store is None or not self.store.refresh_size():
            return None
        self.disk[0]["sectors"] = self.store.sectors
        return {blkif.KEY_SECTORS: self.store.sectors >> int(self.disk[0]["unit_shift"])}

    def removed(self) -> None:
        """The disk has been detached: close the store for good, and leave nothing of it, nor of a process that served
        it before this one: its guest may have gone while there was none."""
        if self.store is not None:
            self.store.close(final=True)
            self.store = None
        self.counters = None
        run_dir = self.context.run_dir
        for path in (run_dir / memory_name(self._identity), run_dir / "stats" / str(self.ident), self.journal_path):
            path.unlink(missing_ok=True)


@dataclass
class QueueState:
    """What one queue holds on to, in the order in which it was got."""

    worker: Worker
    mapping: Any = None
    port: int = -1
    handle: RingHandle | None = None
    last: np.ndarray | None = None
    """The RING as it was when it was detached."""
    keep: list[Any] = field(default_factory=list)


def warm() -> None:
    """Compile all that serves a disk, before the first InitWait."""
    # Nothing is imported later: by then a newer version may lie where this one came from.
    from pvdrivers.storage import file_store

    from . import attach, queue

    attach.warm()
    del queue, file_store
