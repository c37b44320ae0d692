"""`pvdrivers bench net`: its rows, its peers' words, and each kind of traffic once. No timing decides anything here."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pvdrivers.bench import machine, net, net_sides, net_table
from pvdrivers.bench.net_rows import ASKED, GSO, ROWS, Figure, NetWork, Traffic
from pvdrivers.bench.net_table import TABLES, Table
from pvdrivers.bench.peers import testpmd
from pvdrivers.bench.peers.iperf import Between, Ring, Spliced, Veth, figures
from pvdrivers.bench.peers.memcpy import Memcpy
from pvdrivers.bench.peers.testpmd import received
from tests.netback.spaces import need

STATS = """
testpmd> show port stats all
  ######################## NIC statistics for port 0  ########################
  RX-packets: 1000       RX-missed: 0          RX-bytes:  64000
  RX-errors: 0
  TX-packets: 900        TX-errors: 0          TX-bytes:  57600
  Throughput (since last show)
  Rx-pps:            5          Rx-bps:            7
  Tx-pps:            5          Tx-bps:            7
  ############################################################################
  ######################## NIC statistics for port 1  ########################
  RX-packets: 234        RX-missed: 0          RX-bytes:  64000
  Tx-pps:            5          Tx-bps:            7
"""
STOPPED = """
  ---------------------- Forward statistics for port 0  ----------------------
  RX-packets: 77777          RX-dropped: 0             RX-total: 77777
"""


def test_what_testpmd_says_is_understood() -> None:
    assert received(STOPPED + STATS) == 1234
    with pytest.raises(ValueError, match="RX-packets"):
        received(STOPPED)


def test_what_iperf3_says_is_understood() -> None:
    end = {
        "sum_received": {"seconds": 2.0, "bytes": 130_000_000},
        "cpu_utilization_percent": {"host_total": 60.0, "remote_total": 40.0},
    }
    found = figures({"end": end})
    assert (found["bytes_per_second"], found["rate"], found["requests"]) == (65e6, 1000.0, 2000)
    assert found["cpu_us"] == pytest.approx(1000.0)
    with pytest.raises(RuntimeError, match="no route"):
        figures({"error": "no route"})


def test_a_program_that_is_not_there_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(machine.Missing, match="apt-get install dpdk-dev"):
        testpmd.Testpmd(64, (0, 1))
    with pytest.raises(machine.Missing, match="apt-get install"):
        Veth((0, 1))


def test_every_row_of_the_issue_is_there() -> None:
    keys = [work.key for work in (*ROWS, *TABLES)]
    assert len(set(keys)) == len(keys)
    targets = sorted(figure.target for work in ROWS for figure in work.rows if figure.target is not None)
    # Of those beside testpmd and memcpy there is one more where packets are copied by grefs.
    assert targets == sorted([0.02, 0.02, 0.7, 0.7, 0.9, 1.0, 1.0, 1.5, 1.6, 1.7, 48.0] + [0.7, 1.0, 1.0, 1.5, 1.7])
    for work in ROWS:
        assert {figure.beside for figure in work.rows} - {""} == set(work.peers), work.key
    assert {("apart", size) for size in (64, 1500, GSO)} <= {(work.ours.how, work.ours.size) for work in ROWS}
    cells = {(cell.how, cell.size, cell.queues) for table in TABLES for cell in table.cells}
    wanted = {(how, size, n) for how in ("one", "null", "tap") for size in (64, 1500, GSO) for n in (1, 2, 4)}
    assert wanted == cells


def test_memcpy_copies_all_of_its_working_set() -> None:
    peer = Memcpy(65000, 2 << 20)
    memory = memoryview(peer._memory)
    for k in range(16):
        memory[k * 65536] = k + 100
    found = peer.run(0.05)
    assert found["requests"] > 16 and found["bytes_per_second"] > 0
    assert [memory[(1 << 20) + k * 65536] for k in range(16)] == [k + 100 for k in range(16)]


@pytest.mark.jit_only("a real daemon serves")
@pytest.mark.parametrize(
    "traffic",
    [Traffic("both"), Traffic("apart", 1500), Traffic("null"), Traffic("pairs", 1500, pairs=2),
     Traffic("one", GSO, look="all")],
    ids=lambda traffic: traffic.how,
)  # fmt: skip
def test_each_kind_of_traffic_gives_a_row(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    work = NetWork("test", traffic, ROWS[0].rows, ROWS[0].peers)
    monkeypatch.setattr(net, "ROWS", (work, ROWS[0]))
    monkeypatch.setattr(net, "_peer", lambda kind, traffic: contextlib.nullcontext(_peer))
    rows = net.run(pairs=1, seconds=0.2, only=["test"])
    assert [row["unit"] for row in rows] == ["/s", "ns"]
    assert rows[0]["ours"] > 0 and rows[0]["ours_cpu_us"] > 0 and rows[0]["working_set"] == 2 << 20
    assert rows[0]["raw"]["ours"][0]["sent"] >= 1


def _peer(seconds: float) -> dict[str, Any]:
    return {"rate": 1.0, "requests": 1, "seconds": seconds, "bytes_per_second": 1.0, "cpu_us": 1.0, "switch_ns": 1.0}


@pytest.mark.jit_only("a real daemon serves")
def test_a_port_that_the_backend_does_not_know_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (net_sides, net_table):
        monkeypatch.setattr(where, "BRIDGES", {**net_sides.BRIDGES, "null": "nowhere:"})
    work = NetWork("test", Traffic("null"), (Figure("to nobody"), Figure("once more")))
    rows = net._measure(work, 1, 0.1) + net_table.measure(Table("test", "to nobody", "null"), 1, 0.1)
    assert len(rows) == 2 + 9 and all("nowhere:" in row["missing"] for row in rows)


@pytest.mark.jit_only("a real daemon serves")
def test_a_table_has_a_row_for_each_size_and_number_of_queues() -> None:
    rows = net_table.measure(Table("test", "to nobody", "null", (1, 2)), 1, 0.6)
    assert [row["work"].partition(", ")[2] for row in rows] == [
        f"{size}, {queues}"
        for size in ("64 bytes", "1500 bytes", "65000 bytes (GSO)")
        for queues in ("1 queue", "2 queues")
    ]
    assert [row["beside"] for row in rows] == [None, "1 queue"] * 3
    for row in rows:
        assert row["ours"] > 0 and row["ours_cpu_us"] > 0 and "B/s" in row["note"]


@pytest.mark.jit_only("a real daemon serves")
def test_how_long_a_packet_takes() -> None:
    rows = net_table.measure(TABLES[-1], 1, 1.2)
    assert len(rows) == 6 and {row["unit"] for row in rows} == {"us"}
    for median, late in zip(rows[::2], rows[1::2]):
        assert 0 < median["ours"] <= late["ours"]
        assert all(run["sent"] <= run["requests"] + 1 for run in median["runs"])


@pytest.mark.jit_only("a real daemon serves")
def test_the_limit_of_a_vif_beside_what_was_asked() -> None:
    """Not whether it is met; but that both directions are limited, and each is measured by itself."""
    (work,) = (work for work in ROWS if work.key == "limit")
    rows = net._measure(work, 1, 1.0)
    assert [row["beside"] for row in rows] == [ASKED, ASKED]
    assert {row["theirs"] for row in rows} == {work.ours.rate}
    assert all(0.2 < row["median"] < 1.1 for row in rows)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="root makes network namespaces")
@pytest.mark.jit_only("a real daemon serves")
@pytest.mark.parametrize("kind", [Veth, Spliced, Ring])
def test_iperf3_between_two_namespaces(kind: type[Between]) -> None:
    for program in ("ip", "iperf3", "gcc"):
        need(program)
    with kind() as between:
        found = between.both(1.0)
        names = (between.a, between.b)
    assert found["bytes_per_second"] > 1e6 < found["back"] and found["cpu_us"] > 0
    said = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(name in said for name in names)
