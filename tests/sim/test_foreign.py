"""A frontend in C, built with Xen's own headers, joins the embedded Xen and reads a disk of ours."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pvdrivers.sim import toolstack

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "foreign" / "blkfront.c"
SERVE_STARTS = 240.0  # seconds; the first time it compiles all kernels


@pytest.fixture(scope="module")
def blkfront(
    tmp_path_factory: pytest.TempPathFactory,
    require_program: Callable[[str, str], str],
    require_package: Callable[[str, str], str],
) -> Path:
    compiler = require_program("gcc", "gcc")
    require_package("/usr/include/xen/io/blkif.h", "libxen-dev")
    program = tmp_path_factory.mktemp("foreign") / "blkfront"
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, SOURCE], check=True)
    return program


@pytest.fixture(scope="module")
def serve(run_dir: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "pvdrivers", "serve", "--run-dir", os.fspath(run_dir), "--strict"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], SERVE_STARTS)
        assert ready and process.stdout.readline().startswith(b"ready")
        yield
        process.terminate()
        assert process.wait(30) == 0


def fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFF_FFFF_FFFF_FFFF
    return value


def run(blkfront: Path, run_dir: Path, domain: toolstack.Domain, devid: str) -> subprocess.CompletedProcess[str]:
    command = [blkfront, run_dir, str(domain.domid), domain.token.hex(), devid]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("sectors", [1, 8, 89, 2001])
def test_a_disk_is_read_to_its_last_sector(
    blkfront: Path, serve: None, run_dir: Path, dom0: Any, domain: toolstack.Domain, tmp_path: Path, sectors: int
) -> None:
    data = os.urandom(sectors * 512)
    image = tmp_path / "disk.img"
    image.write_bytes(data)
    toolstack.attach_vbd(dom0.store, domain.domid, "xvda", os.fspath(image))
    done = run(blkfront, run_dir, domain, "51712")
    assert (done.stdout, done.stderr) == (f"{len(data)} bytes fnv1a {fnv1a(data):016x}\n", "")
    assert done.returncode == 0


def test_what_a_foreign_program_does_wrong_is_told(
    blkfront: Path, run_dir: Path, domain: toolstack.Domain, tmp_path: Path
) -> None:
    assert "attach a disk" in run(blkfront, run_dir, domain, "51712").stderr
    wrong = toolstack.Domain(domain.domid + 1000, domain.token, "")
    assert "No such process" in run(blkfront, run_dir, wrong, "51712").stderr
    assert "No such file" in run(blkfront, tmp_path, domain, "51712").stderr
