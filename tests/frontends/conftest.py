"""An embedded Xen for all tests of this directory, and for each a guest with a disk and a backend in plain Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pvdrivers import sim
from pvdrivers.frontends.blkfront import Blkfront
from pvdrivers.sim import toolstack
from tests.hostile_backend import Backend

XVDA = 202 << 8


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where an embedded Xen runs."""
    path = tmp_path_factory.mktemp("xen")
    command = [sys.executable, "-m", "pvdrivers", "sim", "--run-dir", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as xen:
        assert xen.stdout is not None
        assert xen.stdout.readline().startswith("ready")
        yield path
        xen.terminate()
        assert xen.wait(20) == 0


@pytest.fixture(scope="session")
def dom0(run_dir: Path) -> Iterator[Any]:
    platform = sim.open(run_dir)
    yield platform
    platform.close()


class Setup:
    """A guest with one disk: the disk, and whoever serves it."""

    def __init__(self, dom0: Any, run_dir: Path) -> None:
        self.dom0 = dom0
        self.domain = toolstack.create_domain(dom0, memory_mib=64)
        self.guest = sim.open(run_dir, self.domain.domid, self.domain.token)
        self.path = toolstack.attach_vbd(dom0.store, self.domain.domid, "xvda", "null:")
        self.backend: Backend | None = None
        self.disk: Blkfront | None = None

    def serve(self, size: int = 1 << 20, **keys: Any) -> Backend:
        """A backend, not yet started."""
        self.backend = Backend(self.dom0, self.path, self.domain.domid, size, **keys)
        return self.backend

    def connect(self, backend: Backend | None = None, **options: Any) -> Blkfront:
        if backend is None:
            backend = self.backend or self.serve()
        backend.start()
        self.disk = Blkfront(self.guest, XVDA, **options)
        self.disk.connect(20)
        return self.disk

    def end(self) -> None:
        if self.disk is not None:
            self.disk.close(timeout=0.5)
        if self.backend is not None:
            self.backend.stop()
        self.guest.close()
        toolstack.clean(self.dom0.store, self.domain.domid, self.domain.uuid)
        assert self.backend is None or not self.backend.errors, self.backend.errors


@pytest.fixture
def setup(dom0: Any, run_dir: Path) -> Iterator[Setup]:
    it = Setup(dom0, run_dir)
    yield it
    it.end()


@pytest.fixture
def make_setup(dom0: Any, run_dir: Path) -> Iterator[Callable[[], Setup]]:
    made: list[Setup] = []

    def make() -> Setup:
        made.append(Setup(dom0, run_dir))
        return made[-1]

    yield make
    for it in made:
        it.end()


@pytest.fixture(scope="session")
def make_setup_once(dom0: Any, run_dir: Path) -> Callable[[], Setup]:
    """For property tests, which end each setup themselves."""
    return lambda: Setup(dom0, run_dir)
