"""The mapper's side of grants: which foreign domains are open, and the Python seam over the compiled one."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pvdrivers import windows
from pvdrivers.errors import PlatformError
from pvdrivers.invoke import invoke
from pvdrivers.platform import GRANT_OP, OP_READONLY, PAGE_SIZE

from . import grant_kernels as k
from . import grant_seam, wire
from .hypercall import HypercallError, Hypercalls

_STATUS = {
    -1: "the entry does not let this domain in, or not so (general error)",
    -2: "no such domain",
    -3: "no such grant reference",
    -7: "no room: too many mappings",
    -9: "it names a page that the domain does not have",
    -12: "another process of this domain has it mapped",
}

_CHECKED_AT_ONCE = 8

_grant_pin = invoke(grant_seam.grant_pin)
_grant_unpin = invoke(grant_seam.grant_unpin)


@dataclass
class Foreign:
    """One foreign domain that is open here: its FOREIGN record and what to undo."""

    slot: int
    memory_fd: int
    regions: list[tuple[int, int]]


class SimMapping:
    """Granted pages side by side. Implements platform.Mapping."""

    def __init__(self, table: SimGrantTable, address: int, ops: np.ndarray) -> None:
        self.address = address
        self.pages = len(ops)
        self._table = table
        self._ops: np.ndarray | None = ops

    def unmap(self) -> None:
        """Give the pages back. A second time is an error: PlatformError."""
        if self._ops is None:
            raise PlatformError(f"the mapping at {self.address:#x} was unmapped already")
        ops, self._ops = self._ops, None
        self._table.release(self.address, ops)

    def __enter__(self) -> SimMapping:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ops is not None:
            self.unmap()


class SimGrantTable:
    """Implements platform.GrantTable; `ctx` is the context of the compiled functions."""

    def __init__(self, hypercalls: Hypercalls, *, strict: bool) -> None:
        self._xen = hypercalls
        self._strict = strict
        self._lock = threading.Lock()
        self._foreign: dict[int, Foreign] = {}
        # Only what is touched takes memory. Kept for the life of the process: a worker may still look.
        self._slots = windows.view(windows.zeros(k.DOMIDS * 2), k.DOMIDS, "u2")
        self._records = windows.view(windows.zeros(k.MOST_FOREIGN * k.FOREIGN.itemsize), k.MOST_FOREIGN, k.FOREIGN)
        self._ctx = np.zeros(1, k.GRANT_CTX)
        self._ctx["owner"] = hypercalls.handle << wire.ACTIVE_OWNER_SHIFT
        self._ctx["domid"] = hypercalls.domid
        self._ctx["strict"] = strict
        self._ctx["slots"] = self._slots.ctypes.data
        self._ctx["foreign"] = self._records.ctypes.data
        self._ctx["limit"] = int(os.environ.get("PVDRIVERS_TEST_MAPTRACK", "0"))  # see docs/testing.md
        self.ctx = int(self._ctx.ctypes.data)

    def prepare(self, domid: int) -> None:
        """Open a domain whose pages will be mapped. Raises PlatformError if it is not there or grants us nothing."""
        with self._lock:
            if domid in self._foreign:
                return
            self._forget_the_gone()
            free = set(range(k.MOST_FOREIGN)) - {f.slot for f in self._foreign.values()}
            if not free:
                raise PlatformError(f"domain {domid}: pages of {k.MOST_FOREIGN} other domains are in use, the limit")
            reply = self._xen.call(wire.FOREIGN, domid)
            pages, entries = reply.values[:2]
            self._foreign[domid] = self._open(min(free), pages, entries, reply.fds)
            self._slots[domid] = self._foreign[domid].slot + 1

    def _open(self, slot: int, pages: int, entries: int, fds: list[int]) -> Foreign:
        memory, grants, active = fds
        size = pages * PAGE_SIZE
        foreign = Foreign(slot, memory, [])

        def kept(address: int, length: int) -> int:
            foreign.regions.append((address, length))
            return address

        try:
            r = np.zeros(1, k.FOREIGN)
            r["grants"] = kept(windows.map_file(grants, entries * 8, windows.READ_WRITE), entries * 8)
            r["active"] = kept(windows.map_file(active, entries * 8, windows.READ_WRITE), entries * 8)
            r["frames"] = kept(windows.zeros(entries * 4), entries * 4)
            r["alias"] = kept(windows.map_file(memory, size, windows.READ_WRITE), size)
            if self._strict:
                r["rw"] = kept(windows.map_file(memory, size, windows.PROT_NONE), size)
                r["ro"] = kept(windows.map_file(memory, size, windows.PROT_NONE), size)
                r["shown"] = kept(windows.zeros(pages * 8), pages * 8)
            else:
                r["rw"] = r["alias"]
                r["ro"] = kept(windows.map_file(memory, size, windows.READ), size)
            r["pages"], r["entries"] = pages, entries
        except BaseException:
            self._drop(foreign)
            raise
        finally:
            os.close(grants)
            os.close(active)
        self._records[slot : slot + 1] = r
        return foreign

    def _drop(self, foreign: Foreign) -> None:
        for address, length in foreign.regions:
            windows.unmap(address, length)
        os.close(foreign.memory_fd)

    def _forget_the_gone(self) -> None:
        """Let go of domains that have ended, once nothing of theirs is mapped here; a few at a time."""
        for domid in list(self._foreign)[:_CHECKED_AT_ONCE]:
            foreign = self._foreign.pop(domid)
            record = self._records[foreign.slot : foreign.slot + 1]
            if self._exists(domid) or self._pinned(record):
                self._foreign[domid] = foreign  # to the end of the line
            else:
                self._slots[domid] = 0
                record["entries"] = 0
                self._drop(foreign)

    def _exists(self, domid: int) -> bool:
        try:
            self._xen.call(wire.DOMAIN_INFO, domid)
        except HypercallError as e:
            return e.errno != errno.ESRCH
        return True

    def _pinned(self, record: np.ndarray) -> bool:
        active = windows.view(int(record["active"][0]), int(record["entries"][0]), "i8")
        return bool((active >> wire.ACTIVE_OWNER_SHIFT & wire.MOST_HANDLES == self._xen.handle).any())

    def map(self, domid: int, grefs: Sequence[int], *, readonly: bool = False) -> SimMapping:
        """Map `grefs` of `domid` side by side. Raises PlatformError naming gref and status; then nothing is mapped."""
        self.prepare(domid)
        if not grefs or max(grefs) > 0xFFFF_FFFF or min(grefs) < 0:
            raise PlatformError(f"domain {domid}: grant references {list(grefs)}: at least one, of 32 bits each")
        ops = np.zeros(len(grefs), GRANT_OP)
        ops["gref"], ops["domid"], ops["flags"] = grefs, domid, OP_READONLY if readonly else 0
        if _grant_pin(self.ctx, ops.ctypes.data, len(ops), 0):
            failed = int(np.flatnonzero(ops["status"])[0])
            status = int(ops["status"][failed])
            pinned = ops[ops["status"] == 0]
            _grant_unpin(self.ctx, pinned.ctypes.data, len(pinned), 0)
            raise PlatformError(
                f"domain {domid}, grant reference {grefs[failed]}: cannot be mapped"
                f" {'readable' if readonly else 'writable'}: GNTST {status}: {_STATUS.get(status, 'unknown')}"
            )
        size = len(ops) * PAGE_SIZE
        protection = windows.READ if readonly else windows.READ_WRITE
        address = 0
        try:
            address = windows.reserve(size)
            with self._lock:  # it may be on its way to the end of the line; as its pages are pinned, it does not go
                fd = self._foreign[domid].memory_fd
            for i, frame in enumerate(ops["address"].tolist()):
                windows.map_file(fd, PAGE_SIZE, protection, offset=frame * PAGE_SIZE, at=address + i * PAGE_SIZE)
        except PlatformError:
            if address:
                windows.unmap(address, size)
            _grant_unpin(self.ctx, ops.ctypes.data, len(ops), 0)
            raise
        return SimMapping(self, address, ops)

    def release(self, address: int, ops: np.ndarray) -> None:
        """SimMapping.unmap."""
        size = len(ops) * PAGE_SIZE
        if self._strict:
            windows.reserve(size, at=address)  # and never used again: a later use faults
        else:
            windows.unmap(address, size)
        if _grant_unpin(self.ctx, ops.ctypes.data, len(ops), 0):
            raise PlatformError(f"grants at {address:#x} were not mapped by this process")

    def close(self) -> None:
        """Let go of all foreign memory. The pins are undone when the platform's connection closes."""
        with self._lock:
            self._slots[:] = 0
            self._records["entries"] = 0
            for foreign in self._foreign.values():
                self._drop(foreign)
            self._foreign.clear()
