"""Beds for the contract tests: one domain that grants and one that maps, on each platform that is here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvdrivers.platform import GRANT_OP, open_platform
from rings.atomics import call
from rings.jit import kernel

OPTIONS: dict[str, dict[str, Any]] = {
    "sim": {},
    "sim-strict": {"strict": True},
    "sim-fifo": {"abi": "fifo"},
}


def passes_with_the_jit_off(path: str) -> None:
    """All tests of a file, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout


@kernel
def through(address: int, ctx: int, a: int, b: int, c: int) -> int:
    """A worker's way of calling the JIT seam."""
    result: int = call(address, ctx, a, b, c)
    return result


@dataclass
class Bed:
    """`front` grants pages and allocates ports, `back` maps them and binds; on Xen both may be dom0."""

    front: Any
    back: Any

    def ops(self, grefs: list[int], **fields: Any) -> np.ndarray:
        """GRANT_OPs on pages of `front`."""
        ops = np.zeros(len(grefs), GRANT_OP)
        ops["gref"], ops["domid"] = grefs, self.front.domid
        for name, value in fields.items():
            ops[name] = value
        return ops


def assert_held(bed: Bed, gref: int) -> None:
    """Somebody has the page of this grant mapped; the granter is told of it where that can be known."""
    if bed.front.pages.sees_mappings:
        assert not bed.front.pages.end(gref)


def own_grant(bed: Bed, domid: int, *, readonly: bool = False) -> int:
    """A grant of a page of its own: not every platform grants a page twice."""
    return int(bed.front.pages.grant(bed.front.pages.alloc(1).frames[0], domid, readonly=readonly))


def seam_call(seam: np.ndarray, name: str, a: int = 0, b: int = 0, c: int = 0) -> int:
    """Call one function of a SEAM by its address."""
    ctx = str(name).split("_")[0] + "_ctx"
    return int(through(int(seam[name][0]), int(seam[ctx][0]), a, b, c))


@pytest.fixture(scope="session")
def embedded_xen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from pvdrivers.sim.launch import EmbeddedXen

    run_dir = tmp_path_factory.mktemp("xen")
    with EmbeddedXen(run_dir):
        yield run_dir


ON_XEN = os.path.exists("/dev/xen/gntdev")


@pytest.fixture(params=[*OPTIONS, *(["xen"] if ON_XEN else [])])
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    if request.param == "xen":
        xen = open_platform("xen")
        yield Bed(xen, xen)
        xen.close()
        return
    from pvdrivers.sim import toolstack

    options = OPTIONS[request.param]
    run_dir = request.getfixturevalue("embedded_xen")
    back: Any = open_platform("sim", run_dir=run_dir, **options)
    domain = toolstack.create_domain(back, memory_mib=4)
    front = open_platform("sim", run_dir=run_dir, domid=domain.domid, token=domain.token, **options)
    yield Bed(front, back)
    front.close()
    back.close()
