"""Grants of the embedded Xen: what only it has, its shared entries and its handling of the dead."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pvdrivers.errors import PlatformError
from pvdrivers.invoke import invoke
from pvdrivers.platform import (
    GRANT_OP,
    OP_READONLY,
    OP_TO_GUEST,
    GNTST_bad_page,
    GNTST_eagain,
    GNTST_general_error,
    GNTST_no_space,
    GNTST_okay,
)
from pvdrivers.sim import grant_seam, toolstack, wire
from pvdrivers.sim.grants import SimGrantTable
from pvdrivers.windows import view

grant_map, grant_unmap = invoke(grant_seam.grant_map), invoke(grant_seam.grant_unmap)
grant_copy = invoke(grant_seam.grant_copy)
PERMIT, READONLY, READING, WRITING, SUB_PAGE = 1, 4, 8, 16, 256
PAGE = 4096


def entries(platform: Any) -> np.ndarray:
    """The grant table of a domain, as it sees it itself."""
    return view(int(platform.pages._ctx["grants"][0]), 4096, [("flags", "u2"), ("domid", "u2"), ("frame", "u4")])


def ops_on(guest: Any, gref: int, flags: int = 0) -> np.ndarray:
    ops = np.zeros(1, GRANT_OP)
    ops["gref"], ops["domid"], ops["flags"] = gref, guest.domid, flags
    return ops


def do(function: Callable[..., int], platform: Any, ops: np.ndarray) -> int:
    function(platform.grants.ctx, ops.ctypes.data, len(ops))
    return int(ops["status"][0])


@pytest.fixture
def page(guest: Any) -> tuple[int, int]:
    """(gref, address) of a page granted to dom0."""
    pages = guest.pages.alloc(1)
    return guest.pages.grant(pages.frames[0], 0), pages.address


def child(run_dir: Path, what: str, *arguments: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.sim.child", what, os.fspath(run_dir), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_the_guest_sees_how_its_page_is_mapped(dom0: Any, guest: Any, page: tuple[int, int]) -> None:
    gref, _ = page
    entry = entries(guest)[gref : gref + 1]
    dom0.prepare(guest.domid)
    reader, writer = ops_on(guest, gref, OP_READONLY), ops_on(guest, gref)
    assert do(grant_map, dom0, reader) == GNTST_okay
    assert entry["flags"] == PERMIT | READING
    assert do(grant_map, dom0, writer) == GNTST_okay
    assert entry["flags"] == PERMIT | READING | WRITING
    assert do(grant_unmap, dom0, writer) == GNTST_okay
    assert entry["flags"] == PERMIT | READING
    assert do(grant_unmap, dom0, reader) == GNTST_okay
    assert entry["flags"] == PERMIT


def test_revoked_while_mapped(dom0: Any, guest: Any, page: tuple[int, int]) -> None:
    gref, address = page
    dom0.prepare(guest.domid)
    ops = ops_on(guest, gref)
    assert do(grant_map, dom0, ops) == GNTST_okay
    entries(guest)["flags"][gref] = 0  # against the rules
    ctypes.memset(int(ops["address"][0]), 7, PAGE)
    assert ctypes.string_at(address, 1) == b"\x07"
    assert do(grant_unmap, dom0, ops) == GNTST_okay
    assert entries(guest)["flags"][gref] == 0
    assert do(grant_map, dom0, ops) == GNTST_general_error


@pytest.mark.parametrize("flags", [0, 2, 3, PERMIT | SUB_PAGE, 0xFFFF, 0xFFFC])
def test_types_that_are_no_plain_access(dom0: Any, guest: Any, page: tuple[int, int], flags: int) -> None:
    gref, _ = page
    dom0.prepare(guest.domid)
    entries(guest)["flags"][gref] = flags
    for ask in (0, OP_READONLY):
        assert do(grant_map, dom0, ops_on(guest, gref, ask)) == GNTST_general_error
    assert entries(guest)["flags"][gref] == flags


@pytest.mark.parametrize("frame", [1024, 1025, 1 << 20, 0xFFFF_FFFF])
def test_a_frame_beyond_the_memory(dom0: Any, guest: Any, page: tuple[int, int], frame: int) -> None:
    gref, _ = page
    dom0.prepare(guest.domid)
    entries(guest)["frame"][gref] = frame
    local = ctypes.create_string_buffer(64)
    for ask in (0, OP_READONLY):
        assert do(grant_map, dom0, ops_on(guest, gref, ask)) == GNTST_bad_page
    copy = ops_on(guest, gref, OP_TO_GUEST)
    copy["address"], copy["length"] = ctypes.addressof(local), 64
    assert do(grant_copy, dom0, copy) == GNTST_bad_page
    assert entries(guest)["flags"][gref] == PERMIT
    with pytest.raises(PlatformError, match="page"):
        dom0.grants.map(guest.domid, [gref])


def test_a_frame_that_changes_while_it_is_mapped(dom0: Any, guest: Any) -> None:
    pages = guest.pages.alloc(2)
    gref = guest.pages.grant(pages.frames[0], 0)
    dom0.prepare(guest.domid)
    first, second = ops_on(guest, gref), ops_on(guest, gref)
    assert do(grant_map, dom0, first) == GNTST_okay
    entries(guest)["frame"][gref] = pages.frames[1]
    assert do(grant_map, dom0, second) == GNTST_okay
    assert first["address"] == second["address"]  # what was pinned counts
    for ops in (first, second):
        assert do(grant_unmap, dom0, ops) == GNTST_okay
    assert do(grant_map, dom0, second) == GNTST_okay
    assert second["address"] != first["address"]
    do(grant_unmap, dom0, second)


def test_one_process_at_a_time(dom0: Any, join: Callable[..., Any], guest: Any, page: tuple[int, int]) -> None:
    gref, _ = page
    other = join()
    dom0.prepare(guest.domid)
    other.prepare(guest.domid)
    ours, theirs = ops_on(guest, gref), ops_on(guest, gref)
    assert do(grant_map, dom0, ours) == GNTST_okay
    assert do(grant_map, other, theirs) == GNTST_eagain
    with pytest.raises(PlatformError, match="another process"):
        other.grants.map(guest.domid, [gref])
    assert do(grant_unmap, other, ours.copy()) != GNTST_okay
    assert do(grant_unmap, dom0, ours) == GNTST_okay
    assert do(grant_map, other, theirs) == GNTST_okay
    assert do(grant_unmap, other, theirs) == GNTST_okay


def test_a_mapper_that_is_killed_lets_go(run_dir: Path, join: Callable[..., Any], guest: Any,
                                         page: tuple[int, int]) -> None:  # fmt: skip
    gref, _ = page
    with child(run_dir, "hold", guest.domid, gref) as process:
        assert process.stdout is not None and process.stdout.readline() == b"mapped\n"
        assert entries(guest)["flags"][gref] == PERMIT | READING | WRITING
        assert not guest.pages.end(gref)
        process.kill()
        process.wait()
        successor = join()  # a restarted backend finds the grant free at once
        successor.grants.map(guest.domid, [gref]).unmap()
    assert guest.pages.end(gref)


@pytest.mark.parametrize("counts", [0, 1, 1 << 16, 3 | 5 << 16])
@pytest.mark.parametrize("busy", [0, wire.ACTIVE_BUSY])
@pytest.mark.parametrize("flags", [PERMIT, PERMIT | READING, PERMIT | READING | WRITING])
def test_a_mapper_that_dies_between_two_steps(
    dom0: Any, join: Callable[..., Any], guest: Any, page: tuple[int, int], counts: int, busy: int, flags: int
) -> None:
    gref, _ = page
    dying = join()
    dying.prepare(guest.domid)
    record = dying.grants._records[dying.grants._foreign[guest.domid].slot]
    active = view(int(record["active"]) + gref * 8, 1, "u8")
    active[0] = counts | busy | dying.hypercalls.handle << wire.ACTIVE_OWNER_SHIFT
    entries(guest)["flags"][gref] = flags
    dying.hypercalls.close()
    successor = join()
    assert active[0] == 0
    assert entries(guest)["flags"][gref] == PERMIT
    successor.grants.map(guest.domid, [gref]).unmap()


@pytest.mark.parametrize("what", ["use_after_unmap", "use_after_python_unmap"])
def test_strict_use_after_unmap_faults(run_dir: Path, guest: Any, page: tuple[int, int], what: str) -> None:
    with child(run_dir, what, guest.domid, page[0]) as process:
        assert process.communicate(timeout=60)[0] == b"unmapped\n"
    assert process.returncode == -signal.SIGSEGV


@pytest.mark.parametrize("strict", [0, 1])
def test_writing_a_read_only_map_faults(run_dir: Path, guest: Any, page: tuple[int, int], strict: int) -> None:
    with child(run_dir, "write_read_only", guest.domid, page[0], strict) as process:
        assert process.communicate(timeout=60)[0] == b"read\n"
    assert process.returncode == -signal.SIGSEGV


def test_strict_the_page_beside_faults(run_dir: Path, guest: Any) -> None:
    pages = guest.pages.alloc(2)
    gref = guest.pages.grant(pages.frames[0], 0)
    with child(run_dir, "neighbour", guest.domid, gref) as process:
        assert process.communicate(timeout=60)[0] == b"written\n"
    assert process.returncode == -signal.SIGSEGV


@pytest.mark.jit_only("a compare-exchange of the interpreter is not atomic between threads")
@pytest.mark.parametrize("strict", [False, True])
def test_threads_of_one_process_may_map_the_same_page(join: Callable[..., Any], guest: Any, strict: bool) -> None:
    back = join(strict=strict)
    pages = guest.pages.alloc(1)
    gref = guest.pages.grant(pages.frames[0], 0)
    back.prepare(guest.domid)
    failures: list[int] = []

    def work(flags: int) -> None:
        ops = np.concatenate([ops_on(guest, gref, flags) for _ in range(5)])
        for _ in range(300):
            if grant_map(back.grants.ctx, ops.ctypes.data, 5) or grant_unmap(back.grants.ctx, ops.ctypes.data, 5):
                failures.append(int(ops["status"].min()))

    threads = [threading.Thread(target=work, args=(flags,)) for flags in (0, OP_READONLY, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert entries(guest)["flags"][gref] == PERMIT
    assert guest.pages.end(gref)


def test_dom0_grants_to_itself(dom0: Any, join: Callable[..., Any]) -> None:
    other = join()
    one, two = dom0.pages.alloc(3), other.pages.alloc(3)
    assert not set(one.frames) & set(two.frames)
    ctypes.memset(one.address, 9, PAGE)
    gref = dom0.pages.grant(one.frames[0], 0)
    with other.grants.map(0, [gref]) as mapping:
        assert ctypes.string_at(mapping.address, 1) == b"\x09"
    assert dom0.pages.end(gref)


def test_what_a_handle_claimed_is_free_when_it_is_gone(dom0: Any, join: Callable[..., Any]) -> None:
    passing = join()
    pages = passing.pages.alloc(1)
    ctypes.memset(pages.address, 3, PAGE)
    gref = passing.pages.grant(pages.frames[0], 0)
    mapping = dom0.grants.map(0, [gref])
    frame = pages.frames[0]
    passing.hypercalls.close()
    held = join()
    assert frame not in held.pages.alloc(1).frames  # still mapped by somebody
    mapping.unmap()
    again = join().pages.alloc(256)
    assert frame in again.frames
    assert ctypes.string_at(again.address, 256 * PAGE) == bytes(256 * PAGE)


def test_a_guest_that_ends_while_it_is_mapped(dom0: Any, join: Callable[..., Any]) -> None:
    domain = toolstack.create_domain(dom0, memory_mib=4)
    guest = join(domain)
    pages = guest.pages.alloc(1)
    ctypes.memset(pages.address, 5, PAGE)
    mapping = dom0.grants.map(domain.domid, [guest.pages.grant(pages.frames[0], 0)])
    guest.close()
    deadline = time.monotonic() + 10
    while dom0.domain_uuid(domain.domid) and time.monotonic() < deadline:
        time.sleep(0.01)  # our question may be read before the end of the other connection
    assert dom0.domain_uuid(domain.domid) == ""
    assert [d.dying for d in toolstack.list_domains(dom0.hypercalls) if d.domid == domain.domid] == [True]
    assert ctypes.string_at(mapping.address, 1) == b"\x05"
    mapping.unmap()
    join().close()  # a handle that comes and goes: the dead are buried
    assert [d for d in toolstack.list_domains(dom0.hypercalls) if d.domid == domain.domid] == []


def test_out_of_memory_names_the_limit(guest: Any) -> None:
    with pytest.raises(PlatformError, match="1024.*--memory"):
        guest.pages.alloc(1025)
    kept = [guest.pages.alloc(128) for _ in range(8)]
    with pytest.raises(PlatformError, match="--memory"):
        guest.pages.alloc(1)
    kept[3].free()
    assert len(guest.pages.alloc(128).frames) == 128


def test_out_of_grefs(dom0: Any, join: Callable[..., Any]) -> None:
    guest = join(toolstack.create_domain(dom0, memory_mib=4, grants=100))
    taken = guest.pages.reserve(92)
    assert sorted(taken) == list(range(8, 100))
    with pytest.raises(PlatformError, match="100"):
        guest.pages.reserve(1)
    assert guest.pages.end(taken[5])
    assert list(guest.pages.reserve(1)) == [taken[5]]


def test_a_limit_of_mappings(dom0: Any, guest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook of docs/testing.md: what fails takes no room, and what is unmapped gives it back; copies need none."""
    pages = guest.pages.alloc(3)
    grefs = [guest.pages.grant(frame, 0) for frame in pages.frames]
    monkeypatch.setenv("PVDRIVERS_TEST_MAPTRACK", "2")
    table = SimGrantTable(dom0.grants._xen, strict=False)
    table.prepare(guest.domid)
    mapper = SimpleNamespace(grants=table)
    first, second, third = (ops_on(guest, gref) for gref in grefs)
    wrong = ops_on(guest, 4000)
    assert do(grant_map, mapper, wrong) == GNTST_general_error
    assert do(grant_map, mapper, first) == do(grant_map, mapper, second) == GNTST_okay
    assert do(grant_map, mapper, third) == GNTST_no_space and third["handle"] == -1
    here = np.zeros(8, np.uint8)
    copy = ops_on(guest, grefs[2])
    copy["address"], copy["length"] = here.ctypes.data, 8
    assert do(grant_copy, mapper, copy) == GNTST_okay
    assert do(grant_unmap, mapper, first) == GNTST_okay
    assert do(grant_map, mapper, third) == GNTST_okay
    assert do(grant_unmap, mapper, third) == do(grant_unmap, mapper, second) == GNTST_okay
    table.close()
