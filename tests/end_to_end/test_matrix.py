"""blkfront and blkback, every feature with every other: written, overwritten at random, read back, and compared with
the image file."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest

from pvdrivers.cli.guest import Guest
from pvdrivers.errors import PvError
from pvdrivers.frontends.blkfront import Blkfront
from pvdrivers.frontends.load import Ledger, Load, Plan
from pvdrivers.storage.uri import parse_disk

FEATURES = {
    "abi": ["x86_64", "x86_32"],
    "persistent": [True, False],
    "indirect": [0, 64],
    "queues": [1, 2],
    "order": [0, 2],
    "policy": ["map", "persistent", "copy"],
    "sector_size": [512, 4096],
    "trusted": [True, False],
}
ALL = list(itertools.product(*FEATURES.values()))
# Steps that share no factor with the number of cases mix the features: each pair of values of two comes up.
SOME = ALL[::19]
MORE = [case for case in ALL[::5] if case not in SOME]


def _verify(disk: Blkfront, image: Path, block_size: int, requests: int) -> None:
    size = 8 << 20
    ledger = Ledger(size, block_size)
    base = {"block_size": block_size, "length": size, "depth": 32, "verify": "all"}
    for plan in (
        Plan(**base, write_percent=100, random=False, requests=ledger.blocks, again_percent=0),
        Plan(**base, write_percent=50, requests=requests),
        Plan(**base, random=False, requests=ledger.blocks),
    ):
        load = Load(disk, plan, ledger)
        assert load.run(60).right, str(load)
    disk.flush()
    with image.open("rb") as file:
        assert ledger.check(0, file.read(ledger.blocks * block_size))


def _run(run_dir: Path, image: Path, case: tuple[object, ...], requests: int) -> None:
    abi, persistent, indirect, queues, order, policy, sector_size, trusted = case
    spec = parse_disk(f"{image},policy={policy},sector_size={sector_size}")
    with Guest(run_dir, memory_mib=128) as guest:
        disk = guest.attach(
            spec,
            abi=abi,
            persistent=persistent,
            indirect=indirect,
            queues=queues,
            ring_order=order,
            trusted=trusted,
        )
        assert disk.info.sector_size == sector_size
        assert len(disk.queues) == queues
        assert disk.ring_order == order
        assert disk.persistent == (persistent and policy == "persistent")
        _verify(disk, image, 4096, requests)
        _verify(disk, image, 65536 if indirect else 40960, requests // 10)
        assert disk.requeue_count == 0
        assert disk.stats()["errors"] == 0
        disk.close()
        assert disk.stats()["stuck_grants"] == 0


def _name(case: tuple[object, ...]) -> str:
    return "-".join(str(value) for value in case)


@pytest.mark.parametrize("case", SOME, ids=_name)
def test_some(run_dir: Path, image: Path, case: tuple[object, ...]) -> None:
    _run(run_dir, image, case, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=_name)
def test_more(run_dir: Path, image: Path, case: tuple[object, ...]) -> None:
    _run(run_dir, image, case, 500)


@pytest.mark.parametrize("order", [1, 3, 4])
def test_orders(run_dir: Path, image: Path, order: int) -> None:
    _run(run_dir, image, ("x86_64", False, 64, 2, order, "map", 512, True), 2000)


@pytest.mark.parametrize("segments", [256, 4096])
def test_large_requests(run_dir: Path, image: Path, segments: int) -> None:
    """One request of 16 MiB, and more than one."""
    with Guest(run_dir, memory_mib=256) as guest:
        disk = guest.attach(parse_disk(f"{image},indirect={segments}"), indirect=segments, queues=1)
        assert disk.max_segments == segments
        data = os.urandom(33 << 20)
        disk.write(4096, data)
        assert disk.read(4096, len(data)) == data
        assert image.read_bytes()[4096 : 4096 + len(data)] == data


def test_flush_discard_and_barrier(run_dir: Path, image: Path) -> None:
    with Guest(run_dir, memory_mib=64) as guest:
        disk = guest.attach(parse_disk(f"{image},secure_discard=on"), queues=2)
        disk.write(0, b"x" * 65536)
        disk.flush()
        if disk.info.barrier:
            disk.barrier(0, b"y" * 4096)
            disk.barrier()
            assert disk.read(0, 8192) == b"y" * 4096 + b"x" * 4096
        disk.discard(8192, 8192)
        assert disk.read(16384, 4096) == b"x" * 4096
        disk.discard(32768, 8192, secure=True)
        assert disk.read(32768, 8192) == bytes(8192)


def test_read_only(run_dir: Path, image: Path) -> None:
    image.write_bytes(b"r" * (1 << 20))
    with Guest(run_dir, memory_mib=64) as guest:
        disk = guest.attach(parse_disk(f"{image},mode=r"))
        assert disk.info.readonly
        assert disk.read(4096, 4096) == b"r" * 4096
        with pytest.raises(OSError):
            disk.write(0, bytes(512))


def test_an_image_that_is_missing_is_said_clearly(run_dir: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with Guest(run_dir, memory_mib=64) as guest, pytest.raises(PvError, match="disk xvda: .*nothing.img"):
        guest.attach(parse_disk(str(tmp_path / "nothing.img")))
    assert time.monotonic() - began < 20


def test_several_disks_of_one_guest(run_dir: Path, tmp_path: Path) -> None:
    with Guest(run_dir, memory_mib=64) as guest:
        disks = [guest.attach(parse_disk(f"memory:{i + 1}M"), queues=1) for i in range(4)]
        assert [disk.name for disk in disks] == ["xvda", "xvdb", "xvdc", "xvdd"]
        assert [disk.info.size >> 20 for disk in disks] == [1, 2, 3, 4]
        for i, disk in enumerate(disks):
            disk.write(0, bytes([i]) * 4096)
        for i, disk in enumerate(disks):
            assert disk.read(0, 4096) == bytes([i]) * 4096
