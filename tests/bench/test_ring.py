"""The benchmark of the ring runs, and says where and beside what. What it measures is nobody's test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pvdrivers.bench import ring, ring_kernels


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "SECONDS_QUICK", 0.0001)
    monkeypatch.setattr(ring, "PAIRS_QUICK", 2)
    poll, sleep = ring.ROWS[0], ring.ROWS[-1]
    monkeypatch.setattr(ring, "ROWS", [poll, sleep])


def test_beside_the_peer(short: None, require_program: object, require_package: object) -> None:
    require_program("gcc", "gcc")  # type: ignore[operator]
    require_package("/usr/include/xen/io/ring.h", "libxen-dev")  # type: ignore[operator]
    said: list[str] = []
    rows = ring.run(True, said.append)
    assert [row["work"] for row in rows] == ["1 page, full, busy", "1 page, full, eventfd"]
    assert len(said) == 2
    for row in rows:
        assert row["pairs"] == 2
        assert row["low"] <= row["median"] <= row["high"]
        assert row["ours"] > 0 < row["theirs"]
        assert row["ours_cpu_ns"] > 0 < row["theirs_cpu_ns"]
        assert "front cpu" in row["where"]
    assert isinstance(rows[0]["met"], bool)
    assert rows[0]["ours_notified"] == 0 < rows[1]["ours_notified"]
    assert "ratio [95 %]" in ring.text(rows).splitlines()[0]


def test_without_the_peer(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    row = ring.run(True)[0]
    assert row["note"] == "no C peer: gcc is not installed"
    assert row["ours"] > 0
    assert "median" not in row
    assert "gcc is not installed" in ring.text([row])


def test_a_peer_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "ring_peer.c"
    broken.write_text("nonsense")
    monkeypatch.setattr(ring, "_PEER", broken)
    program, lack = ring._build(tmp_path)
    assert program is None
    assert lack.startswith("no C peer:")


def test_the_peer_counts_like_the_kernels() -> None:
    source = ring._PEER.read_text()
    for name in ("STAMPS", "BUCKETS", "BUCKET_NS"):
        assert f"{name} = {getattr(ring_kernels, name)}" in source
    assert f"WARM_UP = {ring.WARM_UP}" in source
