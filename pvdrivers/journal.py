"""The journal's file: one a device, in the run directory, mapped shared by the worker, found by the next daemon.

See pvdrivers/worker/journal.py for what a record goes through. Layout: a page of header with one JOURNAL_QUEUE for
each queue from byte 1024 on, then the records of the queues.

A journal belongs to one incarnation of one device: the guest's uuid, the device, its ring grefs and remote ports. With
any mismatch it is discarded, and the device reconnects in order.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pvdrivers.errors import PvError
from pvdrivers.worker.journal import DONE, FREE, JOURNAL_QUEUE, JOURNAL_RECORD, TAKEN

_WRAP = 1 << 32
MAGIC = b"PVJRNL\x00\x01"
VERSION = 1
JOURNAL_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("queues", "<u4"),
        ("record_size", "<u4"),
        ("unused", "<u4"),
        ("incarnation", "S512"),
        ("behind", "S488"),
    ]
)
"""Texts are padded with zeros, which are not there when they are read. `behind`: where the disk's bytes are."""
_QUEUES_AT = JOURNAL_HEADER.itemsize
MAX_QUEUES = (4096 - _QUEUES_AT) // JOURNAL_QUEUE.itemsize


def _ahead(a: int, b: int) -> int:
    """a - b for free-running 32-bit indices, signed."""
    d = (a - b) & 0xFFFFFFFF
    return d - ((d & 0x80000000) << 1)


def layout() -> str:
    """What must be the same for one process to recover from the journal of another."""
    shapes = f"{JOURNAL_QUEUE.itemsize}+{JOURNAL_RECORD.itemsize}"
    return f"{MAGIC[:6].decode()}-{MAGIC[7]}.{VERSION}/{shapes}"


def readable() -> list[str]:
    """The layouts that this version recovers from: its own. One that reads older ones names them here."""
    return [layout()]


class JournalError(PvError):
    """The journal's file could not be made; says which limit was in the way."""


def _file_size(nr_ents: Sequence[int]) -> int:
    """Header and records, in whole pages."""
    return (4096 + sum(nr_ents) * JOURNAL_RECORD.itemsize + 4095) & ~4095


@dataclass
class QueueRecovery:
    """What the journal says of one queue, held against the indices in the ring page."""

    req_cons: int
    """The next request to take."""
    execute: list[int] = field(default_factory=list)
    """Indices of taken records, oldest request first: to be executed again."""
    answer: list[int] = field(default_factory=list)
    """Indices of done records whose response was never pushed, by response index: to be answered, not executed."""


def left_behind(path: Path, behind: str) -> str | None:
    """What a journal's device had behind it, if that was said and is not `behind`, as it is to be now."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        raw = os.pread(fd, JOURNAL_HEADER.itemsize, 0)
    except OSError:
        return None
    finally:
        os.close(fd)
    if len(raw) < JOURNAL_HEADER.itemsize:
        return None
    header = np.frombuffer(raw, JOURNAL_HEADER)[0]
    said: bytes = header["behind"]
    if header["magic"] != MAGIC or not said or said == _cut(behind):  # versions before this one said nothing
        return None
    return said.decode(errors="replace")


def _cut(behind: str) -> bytes:
    """As much as the header has room for."""
    return behind.encode()[: JOURNAL_HEADER["behind"].itemsize]


class Journal:
    """The journal of one device. `memory_only` keeps the records in private memory: nothing survives."""

    def __init__(self, buffer: mmap.mmap, path: Path | None) -> None:
        self._map = buffer
        self.path = path
        self._bytes = np.frombuffer(buffer, np.uint8)
        self.address = int(self._bytes.ctypes.data)
        self._header = self._bytes[: JOURNAL_HEADER.itemsize].view(JOURNAL_HEADER)[0]

    @classmethod
    def create(cls, path: Path | None, incarnation: str, nr_ents: Sequence[int], behind: str = "") -> Journal:
        """A new, empty journal for queues of `nr_ents` records each. Raises JournalError (no room, too many queues).

        With path None it lives in private memory. `behind` is for left_behind().
        """
        if len(nr_ents) > MAX_QUEUES:
            raise JournalError(f"journal: {len(nr_ents)} queues, the limit is {MAX_QUEUES}")
        tag = incarnation.encode()
        if len(tag) > (limit := JOURNAL_HEADER["incarnation"].itemsize):
            raise JournalError(f"journal: an incarnation of {len(tag)} bytes, the limit is {limit}")
        size = _file_size(nr_ents)
        if path is None:
            buffer = mmap.mmap(-1, size)
        else:
            buffer = cls._new_file(path, size)
        journal = cls(buffer, path)
        offset = 4096
        for q, n in enumerate(nr_ents):
            head = journal.queue(q)
            head["nr_ents"], head["records"] = n, offset
            offset += n * JOURNAL_RECORD.itemsize
        journal._header["queues"], journal._header["record_size"] = len(nr_ents), JOURNAL_RECORD.itemsize
        journal._header["incarnation"], journal._header["behind"] = tag, _cut(behind)
        journal._header["magic"], journal._header["version"] = MAGIC, VERSION
        return journal

    @staticmethod
    def _new_file(path: Path, size: int) -> mmap.mmap:
        temporary = path.with_name(path.name + ".new")
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as e:
            raise JournalError(f"journal {path}: cannot be made: {e.strerror}") from e
        try:
            os.posix_fallocate(fd, 0, size)  # a full tmpfs is an error here, a SIGBUS later
            buffer = mmap.mmap(fd, size)
            os.rename(temporary, path)
        except OSError as e:
            os.unlink(temporary)
            raise JournalError(
                f"journal {path}: no room for {size} bytes ({e.strerror}); free space in the run directory"
            ) from e
        finally:
            os.close(fd)
        return buffer

    @classmethod
    def open(cls, path: Path, incarnation: str, nr_ents: Sequence[int]) -> Journal | None:
        """The journal that a predecessor left, if it is of this very incarnation and shape; else None."""
        size = _file_size(nr_ents)
        if len(nr_ents) > MAX_QUEUES:
            return None
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            if os.fstat(fd).st_size != size:
                return None
            os.posix_fallocate(fd, 0, size)  # changes nothing, unless somebody has made a hole
            buffer = mmap.mmap(fd, size)
        except OSError:
            return None
        finally:
            os.close(fd)
        journal = cls(buffer, path)
        if (
            not journal._is_ours()
            or journal.n_queues != len(nr_ents)
            or journal._header["incarnation"] != incarnation.encode()
        ):
            return None
        offset = 4096
        for q, n in enumerate(nr_ents):
            head = journal.queue(q)
            if int(head["nr_ents"]) != n or int(head["records"]) != offset:
                return None
            offset += n * JOURNAL_RECORD.itemsize
        return journal

    @classmethod
    def view(cls, buffer: mmap.mmap) -> Journal | None:
        """Anybody's journal, for reading only; None if it is none, or none that this version can read."""
        if len(buffer) < 4096:
            return None
        journal = cls(buffer, None)
        if not journal._is_ours() or journal.n_queues > MAX_QUEUES:
            return None
        for q in range(journal.n_queues):
            head = journal.queue(q)
            at, end = int(head["records"]), int(head["records"]) + int(head["nr_ents"]) * JOURNAL_RECORD.itemsize
            if at < 4096 or end > len(buffer):
                return None
        return journal

    @property
    def n_queues(self) -> int:
        """How many queues it is for."""
        return int(self._header["queues"])

    def _is_ours(self) -> bool:
        """Whether this version knows how to read it."""
        header = self._header
        return bool(
            header["magic"] == MAGIC
            and header["version"] == VERSION
            and header["record_size"] == JOURNAL_RECORD.itemsize
        )

    def queue(self, q: int) -> np.void:
        """The JOURNAL_QUEUE of queue q, a view."""
        at = _QUEUES_AT + q * JOURNAL_QUEUE.itemsize
        row: np.void = self._bytes[at : at + JOURNAL_QUEUE.itemsize].view(JOURNAL_QUEUE)[0]
        return row

    def queue_address(self, q: int) -> int:
        """The address of the JOURNAL_QUEUE of queue q."""
        return self.address + _QUEUES_AT + q * JOURNAL_QUEUE.itemsize

    def records(self, q: int) -> np.ndarray:
        """The records of queue q: a view, shape (nr_ents,), dtype JOURNAL_RECORD."""
        head = self.queue(q)
        at = int(head["records"])
        return self._bytes[at : at + int(head["nr_ents"]) * JOURNAL_RECORD.itemsize].view(JOURNAL_RECORD)

    def records_address(self, q: int) -> int:
        """The address of the first record of queue q."""
        return self.address + int(self.queue(q)["records"])

    def recover(self, q: int, rsp_prod: int) -> QueueRecovery | None:
        """Sort the records of queue q by what is left to do; `rsp_prod` as the ring page has it. Frees the others.

        None if the guest's page and the journal cannot both be right: then the device reconnects.
        """
        rows = self.records(q)
        n = len(rows)
        req_cons = int(self.queue(q)["req_cons"])
        taken: list[tuple[int, int]] = []
        done: list[tuple[int, int]] = []
        for i in range(n):
            state = int(rows[i]["state"])
            if state == TAKEN:
                # From req_cons on: not counted yet, so it is still on the ring and was never executed. Before it:
                # to be executed, however long ago it was taken.
                if (int(rows[i]["req_index"]) - req_cons) % _WRAP < n:
                    rows[i]["state"] = FREE
                else:
                    taken.append(((req_cons - int(rows[i]["req_index"])) % _WRAP, i))
            elif state == DONE:
                # Before rsp_prod: the guest has the answer.
                ahead = (int(rows[i]["rsp_index"]) - rsp_prod) % _WRAP
                if ahead < n:
                    done.append((ahead, i))
                else:
                    rows[i]["state"] = FREE
            elif state != FREE:
                return None
        taken.sort(reverse=True)
        done.sort()
        # Everything taken has its response pushed, or is in one of the two lists; once.
        if (req_cons - rsp_prod) % _WRAP != len(taken) + len(done):
            return None
        if [ahead for ahead, _ in done] != list(range(len(done))) or len({ago for ago, _ in taken}) != len(taken):
            return None
        return QueueRecovery(req_cons, [i for _, i in taken], [i for _, i in done])

    def reset(self, q: int, req_cons: int) -> None:
        """Start anew: no records, the next request to take is `req_cons`."""
        self.records(q)["state"] = FREE
        self.queue(q)["req_cons"] = req_cons

    def erase(self) -> None:
        """The device has disconnected: nothing of it is to be recovered."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path = None

    def close(self) -> None:
        """Let go of the memory. The file stays."""
        del self._bytes, self._header
        try:
            self._map.close()
        except BufferError:
            pass  # a view is still about; the mapping goes with it
