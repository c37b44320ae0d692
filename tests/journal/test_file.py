"""The journal's file: whatever is in it, opening and recovering end in None or in something that can be carried out."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdrivers.journal import MAX_QUEUES, Journal, JournalError, QueueRecovery, left_behind
from pvdrivers.worker.journal import (
    DONE,
    FREE,
    JOURNAL_QUEUE,
    JOURNAL_RECORD,
    PAYLOAD,
    PAYLOAD_AT,
    TAKEN,
)
from rings.blkif import ENTRY_SIZE_64

WHO = "guest|device|rings"
WRAP = 1 << 32
SHAPE = [4, 8]
SIZE = 8192
indices = st.one_of(
    st.integers(0, WRAP - 1), st.sampled_from([0, 1, 2, 3, 5, WRAP - 1, WRAP - 2, (1 << 31) - 1, 1 << 31])
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal")


def consistent(found: QueueRecovery | None, journal: Journal, q: int, rsp_prod: int) -> None:
    """What a back end relies on."""
    if found is None:
        return
    rows = journal.records(q)
    used = found.execute + found.answer
    assert len(set(used)) == len(used) <= len(rows)
    assert all(0 <= i < len(rows) for i in used)
    assert (rsp_prod + len(used)) % WRAP == found.req_cons
    answers = [int(rows[i]["rsp_index"]) for i in found.answer]
    assert answers == [(rsp_prod + k) % WRAP for k in range(len(answers))]
    ages = [(found.req_cons - int(rows[i]["req_index"])) % WRAP for i in found.execute]
    assert ages == sorted(set(ages), reverse=True) and 0 not in ages
    assert all(rows[i]["state"] == TAKEN for i in found.execute)
    assert all(rows[i]["state"] == DONE for i in found.answer)
    assert all(rows[i]["state"] == FREE for i in range(len(rows)) if i not in used)


def examine(path: Path, shape: list[int], rsp_prod: int) -> bool:
    """Open, recover every queue; whether there was a journal."""
    journal = Journal.open(path, WHO, shape)
    if journal is None:
        return False
    for q in range(len(shape)):
        consistent(journal.recover(q, rsp_prod), journal, q, rsp_prod)
    journal.close()
    return True


def test_layout() -> None:
    assert JOURNAL_RECORD.fields is not None
    assert JOURNAL_RECORD.fields["state"][1] == 0 and JOURNAL_RECORD.fields["payload"][1] == PAYLOAD_AT
    assert JOURNAL_RECORD.itemsize == PAYLOAD_AT + PAYLOAD and PAYLOAD >= ENTRY_SIZE_64
    assert JOURNAL_QUEUE.itemsize == 64 and MAX_QUEUES >= 32


def test_as_it_was_left(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "j", WHO, SHAPE)
    assert oct(os.stat(tmp_path / "j").st_mode & 0o777) == "0o600"
    assert os.listdir(tmp_path) == ["j"]
    journal.reset(1, 7)
    journal.records(1)[5]["payload"][:3] = [1, 2, 3]
    assert journal.records_address(1) - journal.address == 4096 + 4 * JOURNAL_RECORD.itemsize
    journal.close()
    again = Journal.open(tmp_path / "j", WHO, SHAPE)
    assert again is not None
    assert again.records(1)[5]["payload"][:3].tolist() == [1, 2, 3]
    assert again.recover(1, 7) == QueueRecovery(7)
    again.erase()
    assert os.listdir(tmp_path) == []
    again.erase()
    again.close()


def test_what_is_behind(tmp_path: Path) -> None:
    path = tmp_path / "j"
    assert left_behind(path, "file:/a") is None
    path.write_bytes(b"short")
    assert left_behind(path, "file:/a") is None
    Journal.create(path, WHO, SHAPE).close()
    assert left_behind(path, "file:/a") is None, "as versions before left it"
    for name in ("file:/a", "file:/" + "\u00e4" * 300):
        Journal.create(path, WHO, SHAPE, name).close()
        assert left_behind(path, name) is None
        assert (left_behind(path, "file:/b") or "")[:7] == name[:7]
        assert Journal.open(path, WHO, SHAPE) is not None


def test_memory_only_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal.create(None, WHO, SHAPE)
    journal.reset(0, 3)
    assert journal.recover(0, 3) == QueueRecovery(3)
    journal.erase()
    journal.close()


def test_of_another_incarnation_or_shape(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal.create(path, WHO, SHAPE).close()
    for who, shape in ((WHO + "x", SHAPE), (WHO[:-1], SHAPE), ("", SHAPE), (WHO, [4]), (WHO, [8, 4]), (WHO, [4, 8, 1])):
        assert Journal.open(path, who, shape) is None
    assert Journal.open(path, WHO, [1] * (MAX_QUEUES + 1)) is None
    assert Journal.open(tmp_path / "none", WHO, SHAPE) is None
    assert Journal.open(tmp_path, WHO, SHAPE) is None
    os.symlink(path, tmp_path / "link")
    assert Journal.open(tmp_path / "link", WHO, SHAPE) is None
    assert examine(path, SHAPE, 0)


def test_too_much_for_a_journal(tmp_path: Path) -> None:
    Journal.create(None, WHO, [1] * MAX_QUEUES).close()
    with pytest.raises(JournalError, match="queues"):
        Journal.create(tmp_path / "j", WHO, [1] * (MAX_QUEUES + 1))
    with pytest.raises(JournalError, match="incarnation"):
        Journal.create(tmp_path / "j", "x" * 513, SHAPE)
    long = "x" * 512
    Journal.create(tmp_path / "j", long, SHAPE).close()
    assert Journal.open(tmp_path / "j", long, SHAPE) is not None


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4096 + JOURNAL_RECORD.itemsize, SIZE - 1, SIZE + 1, SIZE + 4096])
def test_truncated_or_longer(size: int, tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal.create(path, WHO, SHAPE).close()
    assert os.stat(path).st_size == SIZE
    os.truncate(path, size)
    assert Journal.open(path, WHO, SHAPE) is None


def test_truncated_and_grown_again_is_no_bus_error(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal.create(path, WHO, SHAPE)
    journal.queue(1)["req_cons"] = 2
    journal.records(1)["state"][:2] = TAKEN
    journal.close()
    os.truncate(path, 4096)
    os.truncate(path, SIZE)
    again = Journal.open(path, WHO, SHAPE)
    assert again is not None and again.recover(1, 0) is None


@given(data=st.binary(max_size=256), at=st.integers(0, SIZE - 1), rsp_prod=indices)
def test_any_bytes_anywhere(directory: Path, data: bytes, at: int, rsp_prod: int) -> None:
    path = directory / "bytes"
    Journal.create(path, WHO, SHAPE).close()
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(data[: SIZE - at])
    examine(path, SHAPE, rsp_prod)


@given(data=st.binary(max_size=256), at=st.integers(0, SIZE - 1))
def test_any_bytes_for_a_reader(directory: Path, data: bytes, at: int) -> None:
    """`pvdrivers stats --inflight` reads journals of which it knows neither shape nor incarnation."""
    journal = Journal.create(None, WHO, SHAPE)
    journal._map[at : at + len(data)] = data[: SIZE - at]
    read = Journal.view(journal._map)
    if read is not None:
        for q in range(read.n_queues):
            assert len(read.records(q)["state"]) == read.queue(q)["nr_ents"]


@given(data=st.binary(max_size=2048), rsp_prod=indices)
def test_any_file(directory: Path, data: bytes, rsp_prod: int) -> None:
    path = directory / "file"
    path.write_bytes(data.ljust(SIZE, b"\0"))
    assert not examine(path, SHAPE, rsp_prod)


states = st.sampled_from([FREE, TAKEN, TAKEN, DONE, DONE, 3, 0xFFFFFFFF])
record = st.tuples(states, st.integers(-9, 9), st.integers(-3, 9))


@given(base=indices, cons=st.integers(0, 9), rows=st.lists(record, min_size=8, max_size=8), wild=st.lists(indices))
def test_any_records(directory: Path, base: int, cons: int, rows: list[tuple[int, int, int]], wild: list[int]) -> None:
    """States and indices that nearly fit each other, and some that do not."""
    path = directory / "records"
    journal = Journal.create(path, WHO, SHAPE)
    journal.queue(1)["req_cons"] = (base + cons) % WRAP
    for row, (state, req, rsp) in zip(journal.records(1), rows):
        row["state"] = state
        row["req_index"], row["rsp_index"] = (base + cons + req) % WRAP, (base + rsp) % WRAP
    for row, index in zip(journal.records(1), wild):
        row["req_index"] = index
    journal.close()
    assert examine(path, SHAPE, base)


@given(base=indices, n=st.integers(0, 8), done=st.integers(0, 8), order=st.permutations(range(8)))
def test_what_fits_is_recovered(directory: Path, base: int, n: int, done: int, order: list[int]) -> None:
    """n in flight, the first of them done; in any record."""
    done = min(done, n)
    journal = Journal.create(directory / "fits", WHO, SHAPE)
    journal.queue(1)["req_cons"] = (base + n) % WRAP
    rows = journal.records(1)
    for k, i in enumerate(order[:n]):
        rows[i]["state"] = DONE if k < done else TAKEN
        rows[i]["req_index"], rows[i]["rsp_index"] = (base + k) % WRAP, (base + k) % WRAP
    for i in order[n:]:  # copied, and not counted
        rows[i]["state"], rows[i]["req_index"] = TAKEN, (base + n + i) % WRAP
    found = journal.recover(1, base)
    assert found == QueueRecovery((base + n) % WRAP, execute=list(order[done:n]), answer=list(order[:done]))
    consistent(found, journal, 1, base)
    journal.close()


@pytest.mark.parametrize("behind", [9, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, WRAP - 9])
def test_a_request_that_others_have_overtaken_by_far(behind: int) -> None:
    """An I/O that hangs while 2**31 others come and go is still one that has to be done."""
    journal = Journal.create(None, WHO, [8])
    journal.queue(0)["req_cons"] = 5
    journal.records(0)[3]["state"], journal.records(0)[3]["req_index"] = TAKEN, (5 - behind) % WRAP
    assert journal.recover(0, 4) == QueueRecovery(5, execute=[3])


def test_no_room_is_an_error_with_a_name(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full file system: ENOSPC needs root, see below."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(JournalError, match=r"journal .*/j: no room for 8192 bytes \(.*\); free space"):
            Journal.create(tmp_path / "j", WHO, SHAPE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []
    with pytest.raises(JournalError, match="journal .*/no/j: cannot be made: No such file or directory"):
        Journal.create(tmp_path / "no" / "j", WHO, SHAPE)


@pytest.fixture
def small_tmpfs(tmp_path: Path, require_root: None) -> Iterator[Path]:
    """64 KiB of tmpfs."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.root
def test_a_full_tmpfs_is_an_error_and_no_bus_error(small_tmpfs: Path) -> None:
    Journal.create(small_tmpfs / "first", WHO, SHAPE).close()
    with pytest.raises(JournalError, match="No space left on device"):
        Journal.create(small_tmpfs / "j", WHO, [512])
    assert os.listdir(small_tmpfs) == ["first"]
    # The one that is there stays usable, and a hole in it that cannot be filled makes it unusable.
    assert Journal.open(small_tmpfs / "first", WHO, SHAPE) is not None
    os.truncate(small_tmpfs / "first", 0)
    os.truncate(small_tmpfs / "first", SIZE)
    with open(small_tmpfs / "fill", "wb", buffering=0) as f, pytest.raises(OSError, match="No space"):
        while True:
            f.write(np.ones(4096, np.uint8).tobytes())
    assert Journal.open(small_tmpfs / "first", WHO, SHAPE) is None
