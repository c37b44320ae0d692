from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.hostile_frontend import Frontend
from tests.restart.bed import Bed

FAULTS = re.compile(r"our own fault|Traceback|Segmentation|Fatal|worker .* io_uring")


class Neighbour:
    """An honest guest whose every byte is verified, for as long as the others storm."""

    SIZE = 4 << 20

    def __init__(self, bed: Bed) -> None:
        image = bed.run_dir.parent / "neighbour.img"
        image.write_bytes(bytes(self.SIZE))
        self.disk = bed.disk(str(image), memory_mib=16, queues=2, ring_order=1)
        self.rounds = 0
        self.trouble: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        chance = random.Random(1)
        try:
            while not self._stop.is_set():
                at, data = chance.randrange(self.SIZE >> 12) << 12, chance.randbytes(4096)
                self.disk.write(at, data)
                assert self.disk.read(at, 4096) == data, "the neighbour read something else than it wrote"
                self.rounds += 1
                self._stop.wait(0.002)
        except BaseException as e:
            self.trouble = e

    def check(self) -> None:
        """It goes on, and nothing was wrong."""
        seen, deadline = self.rounds, time.monotonic() + 20
        while self.rounds < seen + 3:
            assert self.trouble is None, repr(self.trouble)
            assert time.monotonic() < deadline, "the neighbour is not served any more"
            time.sleep(0.002)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(20)


class Arena:
    """A daemon, a neighbour, and liars that come and go."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.backend = bed.serve()
        self.neighbour = Neighbour(bed)
        self._read = 0
        self._images = 0

    def image(self, size: int = 1 << 20) -> str:
        self._images += 1
        path = self.bed.run_dir.parent / f"liar-{self._images}.img"
        path.write_bytes(bytes(size))
        return str(path)

    @contextlib.contextmanager
    def liar(self, params: str = "", **how: Any) -> Iterator[Frontend]:
        """A hostile guest; at its end everything must be as it was."""
        front = Frontend(self.bed.run_dir, self.bed.dom0, params or self.image(), **how)
        try:
            yield front
            self.check()
        finally:
            front.destroy()

    def log(self) -> str:
        """What the daemon has said since this was asked last."""
        text = self.bed.log.read_text()
        new, self._read = text[self._read :], len(text)
        return new

    def check(self) -> None:
        status = self.backend.popen.poll()
        assert status is None, f"the daemon has died, {status}\n{self.bed.log.read_text()}"
        self.neighbour.check()
        fault = FAULTS.search(self.bed.log.read_text())
        assert fault is None, self.bed.log.read_text()


@pytest.fixture(scope="package")
def make_arena() -> Iterator[Callable[..., Arena]]:
    with ExitStack() as stack:

        def make(*words: str) -> Arena:
            top = Path(stack.enter_context(TemporaryDirectory(dir="/dev/shm", prefix="pv-hostile-")))
            arena = Arena(stack.enter_context(Bed(top / "run", *words)))
            stack.callback(arena.neighbour.stop)
            return arena

        yield make


@pytest.fixture(scope="package")
def arena(make_arena: Callable[..., Arena]) -> Arena:
    """One daemon for all that storms; use after unmap faults in it."""
    return make_arena("--strict")


@pytest.fixture
def quiet(arena: Arena) -> Arena:
    """The same, with the log read up to here."""
    arena.log()
    return arena
