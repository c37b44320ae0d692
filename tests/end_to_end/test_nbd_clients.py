"""Other people's programs through the ring: fio, qemu-img and nbdcopy, each a process, with guest, Xen and backend."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Require = Callable[[str, str], str]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--untrusted-backend", "--abi", "x86_32"), ("--persistent", "off")])
def test_fio_verifies_mixed_block_sizes(
    export: Any, image: Path, require_program: Require, tmp_path: Path, options: tuple[str, ...]
) -> None:
    fio = require_program("fio", "fio")
    with export(str(image), *options) as uri:
        common = ["--ioengine=nbd", f"--uri={uri}", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1"]
        common += ["--randseed=7", "--verify_state_save=0", f"--aux-path={tmp_path}", "--size=24m"]
        _run(fio, "--name=mixed", *common, "--rw=randwrite", "--bssplit=512/10:4k/50:64k/30:128k/10", "--do_verify=1")
        _run(fio, "--name=both", *common, "--rw=randrw", "--bs=4k")


def test_fio_on_several_connections(export: Any, image: Path, require_program: Require) -> None:
    fio = require_program("fio", "fio")
    with export(str(image), "--queues", "2", "--ring-order", "2") as uri:
        _run(fio, "--name=many", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=8",
             "--numjobs=4", "--size=8m", "--offset_increment=16m", "--verify=sha256", "--do_verify=1",
             "--verify_state_save=0")  # fmt: skip


@pytest.mark.slow
def test_qemu_img_compares(export: Any, image: Path, require_program: Require) -> None:
    qemu_img = require_program("qemu-img", "qemu-utils")
    image.write_bytes(os.urandom(8 << 20))
    copy = image.with_name("copy.img")
    copy.write_bytes(image.read_bytes())
    with export(str(image)) as uri:
        assert "identical" in _run(qemu_img, "compare", "-f", "raw", "-F", "raw", str(copy), uri)
    with export(f"{image},mode=r") as uri:
        assert "identical" in _run(qemu_img, "compare", "-f", "raw", "-F", "raw", str(copy), uri)


@pytest.mark.slow
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_nbdcopy_there_and_back(export: Any, image: Path, require_program: Require, sector_size: int) -> None:
    nbdcopy = require_program("nbdcopy", "libnbd-bin")
    source, back = image.with_name("source.img"), image.with_name("back.img")
    source.write_bytes(os.urandom(16 << 20) + bytes(32 << 20) + os.urandom(16 << 20))
    with export(f"{image},sector_size={sector_size}") as uri:
        _run(nbdcopy, "--flush", str(source), uri)
        _run(nbdcopy, uri, str(back))
    assert back.read_bytes() == source.read_bytes()
    assert image.read_bytes() == source.read_bytes()


@pytest.mark.slow
def test_qemu_img_converts_into_the_guest(export: Any, image: Path, require_program: Require) -> None:
    """Write zeroes, trim and FUA as QEMU uses them."""
    qemu_img = require_program("qemu-img", "qemu-utils")
    source = image.with_name("source.img")
    source.write_bytes(os.urandom(5 << 20) + bytes(20 << 20) + os.urandom(39 << 20))
    image.write_bytes(b"\xff" * (64 << 20))
    with export(str(image)) as uri:
        _run(qemu_img, "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri)
    assert image.read_bytes() == source.read_bytes()
