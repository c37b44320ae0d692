"""How many pages of guests may be mapped: by this host, by this process, for one domain, for one device.

Xen has a bounded number of handles for mapped grants (maptrack), and the kernel's own backends want some of them too.
So a device sets aside what its rings may have mapped before it connects, and gets less where that does not fit: never
an error, since pages can be copied as well.

RUN_DIR/budget/PID holds what a process has set aside, a line a device: name, domid, pages. Its lock (flock) is held as
long as the process lives, so a file whose lock is free means nothing and is removed. RUN_DIR/budget/lock is held while
somebody counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_PARAMETER = "gnttab_max_maptrack_frames"


@dataclass(frozen=True)
class Limit:
    """One limit, as it is for one device: pages in all, pages that are not set aside yet, and how it is called."""

    pages: int
    left: int
    text: str


class Budget:
    """What this process has set aside. Any thread may call."""

    def __init__(
        self, run_dir: Path, host_pages: int | None, *, pages: int | None = None, mappings: int | None = None,
        per_domain: int | None = None,
    ) -> None:  # fmt: skip
        """`host_pages`: what all processes of this run directory may have together, None: any number. `pages`: what
        this one may have, whatever the others have. `mappings`: what the kernel lets it have. `per_domain`: for one
        guest, by default half of that."""
        self._directory = run_dir / "budget"
        self._host, self._pages, self._mappings = host_pages, pages, mappings
        most = [n for n in (host_pages if pages is None else pages, mappings) if n is not None]
        self._per_domain = min(most) // 2 if per_domain is None and most else per_domain
        self._lock = threading.Lock()
        self._own: dict[str, tuple[int, int]] = {}
        self._path: Path | None = None
        self._fd = -1
        self._told = False

    @property
    def limited(self) -> bool:
        """Whether there is any limit for all devices."""
        return self._per_domain is not None

    def reserve(self, device: str, domid: int, steps: Sequence[int], most: int | None = None) -> tuple[int, str]:
        """Set pages aside for a device, instead of what it had: the first of `steps`, which fall, that fits.

        The last one is had in any case. Returns its index, and which limit was in the way of the one before, with what
        to do about it; "" if the first one fits. `most` is the device's own limit.
        """
        with self._lock, self._counting() as others:
            self._own.pop(device, None)
            why = ""
            for index, wanted in enumerate(steps):
                lacking = [x for x in self._limits(device, domid, most, others) if wanted > x.left]
                if not lacking:
                    break
                if index < len(steps) - 1:
                    tightest = min(lacking, key=lambda x: x.left)
                    why = f"{max(tightest.left, 0)} pages are left of {tightest.pages} {tightest.text}"
            self._own[device] = (domid, steps[index])
            self._publish()
            return index, why

    def give_back(self, device: str) -> None:
        """The device has nothing mapped any more. Harmless if it had set nothing aside."""
        with self._lock:
            if self._own.pop(device, None) is not None:
                with self._counting():
                    self._publish()

    def _limits(self, device: str, domid: int, most: int | None, others: list[tuple[int, int]]) -> Iterator[Limit]:
        own = list(self._own.values())
        used = sum(pages for _, pages in own)
        if most is not None:
            yield Limit(most, most, "that the disk may have; raise its option grant_pages")
        if self._per_domain is not None:
            left = self._per_domain - sum(pages for d, pages in own + others if d == domid)
            yield Limit(self._per_domain, left, f"that domain {domid} may have; raise --grant-pages-per-domain")
        if self._pages is not None:
            yield Limit(self._pages, self._pages - used, "that this process may have; raise --grant-pages")
        elif self._host is not None:
            left = self._host - sum(pages for _, pages in own + others)
            text = f"that this host may have mapped; raise {_PARAMETER} on Xen's command line, or --grant-pages"
            yield Limit(self._host, left, text)
        if self._mappings is not None:
            text = "that a process may have mapped; raise the sysctl vm.max_map_count, and restart"
            yield Limit(self._mappings, self._mappings - used, text)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[list[tuple[int, int]]]:
        """While this lasts no other process sets anything aside: (domid, pages) of each device of theirs."""
        if not self.limited:
            yield []
            return
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = _open(self._directory / "lock")
        except OSError as e:
            self._say(e)
            yield []
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield list(self._others())
        finally:
            os.close(lock)

    def _others(self) -> Iterator[tuple[int, int]]:
        for path in self._directory.iterdir():
            if path.name == "lock" or path == self._path:
                continue
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    path.unlink()  # whoever wrote it has ended
                except BlockingIOError:
                    yield from _parsed(os.pread(fd, 1 << 20, 0))
                finally:
                    os.close(fd)

    def _publish(self) -> None:
        """Let the others know; within _counting()."""
        if not self.limited:
            return
        try:
            if self._fd < 0:
                self._fd, self._path = self._new_file()
            text = "".join(f"{name} {domid} {pages}\n" for name, (domid, pages) in sorted(self._own.items()))
            data = text.encode()
            if os.pwrite(self._fd, data, 0) != len(data):
                raise OSError(0, "no room")
            os.ftruncate(self._fd, len(data))
        except OSError as e:
            self._say(e)

    def _new_file(self) -> tuple[int, Path]:
        for n in range(1000):
            path = self._directory / (str(os.getpid()) + (f"-{n}" if n else ""))
            fd = _open(path)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd, path
            except BlockingIOError:  # of a process of the same number, in another namespace
                os.close(fd)
        raise OSError(0, "too many files")

    def _say(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            log.warning(
                "%s: %s; other processes do not see what this one has set aside of this host's grants",
                self._directory, error.strerror,
            )  # fmt: skip

    def close(self) -> None:
        """Give everything back."""
        with self._lock:
            self._own.clear()
            if self._fd >= 0 and self._path is not None:
                with self._counting():
                    self._path.unlink(missing_ok=True)
                    os.close(self._fd)
                self._fd, self._path = -1, None


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _parsed(data: bytes) -> Iterator[tuple[int, int]]:
    for line in data.decode("ascii", "replace").splitlines():
        words = line.split()
        if len(words) == 3 and words[1].isdigit() and words[2].isdigit():
            yield int(words[1]), int(words[2])
