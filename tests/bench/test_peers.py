"""The other programs: what they say is understood, and what is lacking is told. No timing decides anything here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pvdrivers.bench import blk, machine
from pvdrivers.bench.agent import Agent, AgentError
from pvdrivers.bench.blk_rows import ROWS
from pvdrivers.bench.files import DataFile, Files
from pvdrivers.bench.peers import fio
from pvdrivers.bench.peers.qemu import StorageDaemon

SIDE = {"total_ios": 0, "iops": 0.0, "bw_bytes": 0, "runtime": 0, "clat_ns": {"mean": 0.0}}


def test_what_fio_says_is_understood() -> None:
    read = {
        "total_ios": 1000, "iops": 500.0, "bw_bytes": 2048000, "runtime": 2000,
        "clat_ns": {"mean": 60_000.0, "percentile": {"50.000000": 50_000, "99.000000": 90_000}},
    }  # fmt: skip
    job = {"error": 0, "read": read, "write": SIDE, "usr_cpu": 10.0, "sys_cpu": 40.0, "job_runtime": 2000}
    found = fio.figures({"jobs": [job]})
    assert found["rate"] == 500.0 and found["seconds"] == 2.0
    assert (found["p50_us"], found["p99_us"], found["mean_us"]) == (50.0, 90.0, 60.0)
    assert found["cpu_us"] == pytest.approx(1000.0)
    with pytest.raises(RuntimeError, match="error 5"):
        fio.figures({"jobs": [{**job, "error": 5}]})


def test_a_program_that_is_not_there_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(machine.Missing, match="apt-get install fio"):
        fio.present()
    with pytest.raises(machine.Missing, match="apt-get install qemu-system-common"):
        StorageDaemon(tmp_path / "none", depth=1)


def test_every_row_of_the_issue_is_there() -> None:
    keys = [work.key for work in ROWS]
    assert len(set(keys)) == len(keys)
    targets = sorted(peer.target for work in ROWS for peer in work.peers if peer.target is not None)
    assert targets == [0.15, 0.88, 0.9, 0.97, 0.97, 0.97, 1.0, 1.05, 1.28, 1.3]


def test_a_data_file_is_not_sparse_and_goes_away(tmp_path: Path) -> None:
    with DataFile(tmp_path, (5 << 20) + 512) as file:
        st = file.path.stat()
        assert st.st_size == (5 << 20) + 512
        assert st.st_blocks * 512 >= 5 << 20
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_memory_is_no_place_for_direct_io(tmp_path: Path) -> None:
    import contextlib

    with contextlib.ExitStack() as stack, pytest.raises(machine.Missing, match="--dir"):
        Files(stack, Path("/proc")).path("disk")


def test_an_agent_that_fails_says_why() -> None:
    with pytest.raises(AgentError, match=r"vhost_user_blk: (FileNotFoundError|ConnectionRefusedError)"):
        Agent(
            "pvdrivers.bench.peers.vhost_user_blk",
            {"socket": "/nonexistent", "size": 1 << 20, "block_size": 4096, "depth": 1, "op": "read", "random": True},
        )


def test_this_machine_is_described() -> None:
    json.dumps(machine.describe())


@pytest.mark.slow
def test_our_client_drives_a_storage_daemon(require_program: Callable[[str, str], str], tmp_path: Path) -> None:
    require_program("qemu-storage-daemon", "qemu-system-common")
    path = tmp_path / "disk"
    path.write_bytes(bytes(4 << 20))
    for depth, spin, random, iothread in ((1, 0, True, False), (32, 1000, True, True), (100, 0, False, False)):
        with StorageDaemon(path, depth=depth, random=random, spin=spin, iothread=iothread) as daemon:
            found = daemon.run(0.3)
            while not found["requests"]:  # the first has compiled the client's loop
                found = daemon.run(0.3)
            assert found["p50_us"] > 0
            assert found["cpu_us"] is not None


@pytest.mark.slow
def test_a_small_run_has_every_figure(require_program: Callable[[str, str], str], tmp_path: Path) -> None:
    require_program("fio", "fio")
    rows = blk.run(True, directory=tmp_path, pairs=1, seconds=1.0, only=["tmpfs", "seqwrite", "null"], size=16 << 20)
    assert [row["beside"] for row in rows][-1] == "the ring alone, full, one page"
    for row in rows:
        if "missing" in row:  # no O_DIRECT where the tests' files are
            assert "O_DIRECT" in row["missing"]
            continue
        check(row)


def check(row: dict[str, Any]) -> None:
    assert row["ours"] > 0 and row["theirs"] > 0 and row["pairs"] == 1
    assert row["ours_cpu_us"] > 0 and row["theirs_cpu_us"] > 0
    assert row["ours_p50_us"] > 0 and row["ours_where"] and row["theirs_where"]
