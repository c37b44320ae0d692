"""An embedded Xen for the session, and handles on it that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pvdrivers import sim
from pvdrivers.sim import toolstack
from pvdrivers.sim.launch import EmbeddedXen


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("xen")
    with EmbeddedXen(path):
        yield path


@pytest.fixture
def join(run_dir: Path) -> Iterator[Callable[..., Any]]:
    """``join(domain=None, **options)``: a platform, closed when the test ends."""
    opened: list[Any] = []

    def joined(domain: toolstack.Domain | None = None, **options: Any) -> Any:
        if domain is None:
            opened.append(sim.open(run_dir, **options))
        else:
            opened.append(sim.open(run_dir, domain.domid, domain.token, **options))
        return opened[-1]

    yield joined
    for platform in reversed(opened):
        platform.close()


@pytest.fixture
def dom0(join: Callable[..., Any]) -> Any:
    return join()


@pytest.fixture
def domain(dom0: Any) -> toolstack.Domain:
    return toolstack.create_domain(dom0, memory_mib=4)


@pytest.fixture
def guest(join: Callable[..., Any], domain: toolstack.Domain) -> Any:
    return join(domain)
