"""Counters in a file: what is written is what is read, and any file is read without an exception."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdrivers.errors import PvError
from pvdrivers.stats import HEADER, StatsFile, read_stats
from pvdrivers.worker.records import STATS


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stats")


def test_layout_is_all_words() -> None:
    assert STATS.itemsize % 64 == 0
    assert all(STATS[name].base == np.uint64 for name in STATS.names or ())


@given(queues=st.integers(1, 4), about=st.dictionaries(st.text(max_size=8), st.text(max_size=8)), data=st.data())
def test_round_trip(directory: Path, queues: int, about: dict[str, str], data: st.DataObject) -> None:
    path = directory / "stats" / "vbd-1-51712"
    file = StatsFile(path, about, queues)
    assert len(file.queues) == queues
    content = data.draw(st.binary(min_size=16, max_size=64))
    for q in range(queues):
        assert file.address(q) == file.queues[q : q + 1].ctypes.data
        file.queues[q] = np.frombuffer((content * (STATS.itemsize // 16 + 1))[q : q + STATS.itemsize], STATS)[0]
    got = read_stats(path)
    assert got is not None
    said, rows = got
    assert said == {**about, "queues": queues, "pid": os.getpid()}
    assert rows.tobytes() == file.queues.tobytes()
    rows["errors"] = 1  # a copy
    assert os.stat(path).st_mode & 0o777 == 0o600
    file.remove()
    file.remove()
    assert read_stats(path) is None
    assert os.listdir(path.parent) == []


texts = st.text(max_size=64).map(str.encode)


@given(data=st.one_of(st.binary(max_size=64), texts), size=st.sampled_from([0, 64, 4096]))
def test_any_file_is_read_or_none(directory: Path, data: bytes, size: int) -> None:
    path = directory / "any"
    path.write_bytes(data.ljust(HEADER, b"\0") + bytes(size))
    got = read_stats(path)
    assert got is None or len(got[1]) == got[0]["queues"]


@pytest.mark.parametrize(
    "header",
    [
        '{"queues": -1}', '{"queues": 2}', '{"queues": 1e99}', '{"queues": "1"}', '{"queues": 0}', '{"queues": true}',
        '{"queues": 123456789012345678901234567890}', "[]", "7", '"queues"', "null", "{}", "[" * 4000,
        '{"queues": 1.0}',
        '{"queues": null}', '{"queues": NaN}', "\ufffd",
    ],
)  # fmt: skip
def test_headers_that_lie(header: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(header.encode().ljust(HEADER, b"\0") + bytes(STATS.itemsize + 8))
    got = read_stats(path)
    assert got is None or (isinstance(got[0], dict) and len(got[1]) == got[0]["queues"] <= 1)


def test_a_directory_and_a_short_file(tmp_path: Path) -> None:
    assert read_stats(tmp_path) is None
    assert read_stats(tmp_path / "none") is None
    (tmp_path / "short").write_bytes(b'{"queues": 1}')
    assert read_stats(tmp_path / "short") is None


def test_no_room(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER, before[1]))
    try:
        with pytest.raises(PvError, match="no room for"):
            StatsFile(tmp_path / "stats" / "f", {}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path / "stats") == []
    with pytest.raises(PvError, match="the limit is 4095"):
        StatsFile(tmp_path / "stats" / "f", {"uri": "x" * 5000}, 1)
