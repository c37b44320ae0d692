"""Collected in dom0 only; on any other machine this directory has no tests. `make test-xen` boots one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

ON_XEN = os.path.exists("/dev/xen/gntdev") and os.path.isdir("/bed/guests")
collect_ignore_glob = [] if ON_XEN else ["test_*.py"]

if ON_XEN:
    from pvdrivers.platform import open_platform

    from .backends import BACKENDS, Backend, Disk
    from .guests import Guest
    from .lives import Yard, yard
    from .serve import Serve
    from .stores import Stores
    from .system import RESULTS, logs, sh

    GNTALLOC_LIMIT = Path("/sys/module/xen_gntalloc/parameters/limit")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Logs of daemons and guests go with a failure, which can be read while the other tests run."""
        report = yield
        if report.failed:
            for name, path in logs.items():
                if path.exists():
                    report.sections.append((name, path.read_text(errors="replace")[-3000:]))
            with (RESULTS / "failures.log").open("a") as out:
                print(f"=== {report.nodeid}\n{report.longreprtext}", file=out)
                print(*(f"--- {name}\n{text}" for name, text in report.sections), sep="\n", file=out)
        return report

    @pytest.fixture
    def stores(tmp_path: Path) -> Iterator[Stores]:
        """Files in memory and loop devices; gone with the test."""
        with Stores(tmp_path) as made:
            yield made

    @pytest.fixture
    def guest() -> Iterator[Callable[..., Guest]]:
        """Makes guests, see Guest; destroyed with the test, their consoles shown when it failed."""
        with ExitStack() as stack:
            yield lambda *words, **more: stack.enter_context(Guest(*words, **more))

    @pytest.fixture(scope="module")
    def module_guest() -> Iterator[Callable[..., Guest]]:
        """The same for a guest that the tests of one file share."""
        with ExitStack() as stack:
            yield lambda *words, **more: stack.enter_context(Guest(*words, **more))

    @pytest.fixture(scope="module")
    def the_yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
        """A daemon and a neighbour that notices nothing, for the tests of one file."""
        with yard(tmp_path_factory.mktemp("yard")) as made:
            yield made

    @pytest.fixture
    def here(the_yard: Yard) -> Iterator[Yard]:
        """The same, and the neighbour has indeed noticed nothing of this test."""
        yield the_yard
        the_yard.check_unnoticed()

    @pytest.fixture(scope="module")
    def platform() -> Iterator[Any]:
        """The real Xen as our frontends in dom0 see it, with room to grant all of their pages."""
        sh("modprobe", "xen-gntalloc")
        GNTALLOC_LIMIT.write_text("32768")
        xen = open_platform("xen")
        yield xen
        xen.close()

    @pytest.fixture(scope="module", params=list(BACKENDS))
    def backend(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[tuple[str, Backend]]:
        """Each backend of dom0 in turn, running: its name, and what it is."""
        made = BACKENDS[request.param](tmp_path_factory.mktemp("backend"))
        yield request.param, made
        made.stop()
        time.sleep(0.5)

    @pytest.fixture
    def attach(backend: tuple[str, Backend], platform: Any, stores: Stores) -> Iterator[Callable[..., Disk]]:
        """Attaches the disk of a test to dom0: so many MiB of a loop device, mode "r" or "w"."""
        made: list[Disk] = []

        def one(mib: int, mode: str = "w", random: bool = False) -> Disk:
            made.append(Disk(*backend, platform, stores.loop(stores.file("disk", mib, random=random)), mode))
            return made[-1]

        yield one
        for disk in made:
            disk.end()

    @pytest.fixture
    def serve() -> Iterator[Callable[..., Serve]]:
        """Starts daemons, see Serve; stopped with the test."""
        with ExitStack() as stack:
            yield lambda *words, **more: stack.enter_context(Serve(*words, **more))

    @pytest.fixture(scope="module")
    def module_serve() -> Iterator[Callable[..., Serve]]:
        """The same for a daemon that the tests of one file share: a start takes seconds under emulation."""
        with ExitStack() as stack:
            yield lambda *words, **more: stack.enter_context(Serve(*words, **more))
