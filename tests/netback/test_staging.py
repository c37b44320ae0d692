"""Staging grants by a real daemon: pages that stay mapped, what it saves, and every way to ask for the wrong thing."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any

import numpy as np
import pytest

from netback import staging, staging_share
from netback.staging import STAGE_SIZE
from pvdrivers.cli.stats import snapshot
from pvdrivers.frontends.netfront_keys import Wishes
from pvdrivers.platform import GRANT_OP, SEAM
from pvdrivers.worker.control import Memory
from pvdrivers.worker.records import WORKER
from rings import netif

from .conftest import Guest, until
from .naive_control import INVALID, NOT_SUPPORTED, OKAY
from .test_hostile import NO_GREF, talk
from .test_hostile_control import answers, control, put

pytestmark = pytest.mark.jit_only("a real daemon serves")
GET, ADD, DEL = netif.CTRL_GET_GREF_MAPPING_SIZE, netif.CTRL_ADD_GREF_MAPPING, netif.CTRL_DEL_GREF_MAPPING
LIMIT = 512
UNSTAGED = Wishes(staging=False)


def counters(guest: Guest, queue: int = 0) -> Any:
    (found,) = [d for d in snapshot(guest.net.run_dir) if d["device"] == guest.name]
    return found["queues"][queue]


def grefs(*entries: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<IHH", ref, flags, 0x5555) for ref, flags in entries)


def ask(guest: Guest, kind: int, queue: int, content: bytes, entries: int | None = None) -> tuple[int, int, list[int]]:
    """Status and data of the answer, and the status of each entry."""
    ring = control(guest)
    assert ring._pages is not None
    ctypes.memmove(ring._pages.address + 4096, content, len(content))
    put(guest, (1, kind, queue, ring._grefs[1], len(content) // 8 if entries is None else entries))
    _, _, status, data = answers(guest, 1)[0]
    after = ctypes.string_at(ring._pages.address + 4096, len(content))
    return status, data, [one[2] for one in struct.iter_unpack("<IHH", after)]


def spare(guest: Guest, count: int) -> tuple[Any, list[int]]:
    """Pages of the guest that are on no ring: their memory and grefs."""
    pages = guest.platform.pages.alloc(count)
    return pages, [guest.platform.pages.grant(frame, 0) for frame in pages.frames]


@pytest.mark.parametrize("staged", [(True, True), (True, False), (False, True), (False, False)])
def test_every_byte_arrives_whoever_has_pages_mapped(net: Any, staged: tuple[bool, bool]) -> None:
    a, b = (net.guest(wishes=Wishes(staging=one)) for one in staged)
    assert [guest.vif.staged for guest in (a, b)] == [LIMIT * one for one in staged]
    for size in (14, 60, 128, 129, 1514, 4096, 4097, 9014, 65535):
        frame = a.frame(b, os.urandom(size - 14))
        a.vif.send(frame)
        assert b.vif.receive(5) == frame
    sent, got = counters(a), counters(b)
    assert (sent["persistent_held"], got["persistent_held"]) == tuple(LIMIT * one for one in staged)
    assert (sent["persistent_hits"] > 0, got["persistent_hits"] > 0) == staged
    if all(staged):
        assert (sent["grants_copied"], got["grants_copied"]) == (1, 1), "nothing but the list of grefs"
    else:
        assert sent["grants_copied"] + got["grants_copied"] > 9


def test_with_checksums_floods_and_more_receivers(net: Any) -> None:
    """Where all of a packet is fetched, it is out of mapped pages as well."""
    a, b, c = net.guest(), net.guest(wishes=Wishes(csum4=False)), net.guest(wishes=UNSTAGED)
    frame = a.frame(b"\xff" * 6, os.urandom(5000))
    a.vif.send(frame)
    assert b.vif.receive(5) == c.vif.receive(5) == frame


def test_how_many(net: Any) -> None:
    guest = net.guest(queues=2, wishes=UNSTAGED)
    for queue, status, data in ((0, OKAY, LIMIT), (1, OKAY, LIMIT), (2, INVALID, 0), (0xFFFFFFFF, INVALID, 0)):
        put(guest, (1, GET, queue, 0, 0))
        assert answers(guest, 1)[0][2:] == (status, data)
    none = net.guest(be={"staging": 0})
    assert none.vif.staged == 0
    put(none, (1, GET, 0, 0, 0))
    assert answers(none, 1)[0][2:] == (OKAY, 0)
    for kind in (ADD, DEL):
        assert ask(none, kind, 0, grefs((8, 0)))[:2] == (NOT_SUPPORTED, 0)
    few = net.guest(be={"staging": 100}, queues=2)
    assert few.vif.staged == 200
    assert [counters(few, q)["persistent_held"] for q in (0, 1)] == [100, 100]


def test_added_and_taken_back(net: Any) -> None:
    guest = net.guest(wishes=UNSTAGED)
    _pages, mine = spare(guest, 4)
    end = guest.platform.pages.end
    assert ask(guest, ADD, 0, grefs(*((gref, 0) for gref in mine)))[:2] == (OKAY, 0)
    assert counters(guest)["persistent_held"] == 4
    assert not end(mine[0]), "it is mapped"
    status, data, each = ask(guest, DEL, 0, grefs((mine[0], 0), (NO_GREF, 0), (mine[2], 0), (mine[0], 0)))
    assert (status, data, each) == (OKAY, 2, [OKAY, INVALID, OKAY, INVALID])
    assert end(mine[0]) and end(mine[2])
    assert counters(guest)["persistent_held"] == 2
    assert ask(guest, DEL, 0, b"") == (OKAY, 0, [])
    assert ask(guest, ADD, 0, b"") == (OKAY, 0, [])


def test_a_list_with_one_that_is_wrong_adds_none(net: Any) -> None:
    guest = net.guest(queues=2, wishes=UNSTAGED)
    pages, mine = spare(guest, 3)
    readonly = guest.platform.pages.grant(pages.frames[2], 0, readonly=True)
    good = [(mine[0], 0), (mine[1], 0)]
    for bad in (
        [(NO_GREF, 0)],  # cannot be mapped
        [(readonly, 0)],  # not so
        [(mine[2], 2)],  # a flag that there is not
        [(mine[2], 0xFFFE)],
        [(mine[0], 0)],  # twice in a list
    ):
        assert ask(guest, ADD, 0, grefs(*good, *bad))[:2] == (INVALID, 0)
        assert counters(guest)["persistent_held"] == 0
    assert ask(guest, ADD, 2, grefs(*good))[0] == INVALID, "a queue that there is not"
    assert ask(guest, ADD, 0, grefs((readonly, netif.GREF_readonly), *good))[0] == OKAY
    assert ask(guest, ADD, 0, grefs((mine[2], 0), *good))[0] == INVALID, "there already"
    assert ask(guest, ADD, 1, grefs(*good))[0] == OKAY, "another queue is another table"
    assert ask(guest, DEL, 1, grefs((readonly, 0), *good)) == (OKAY, 2, [INVALID, OKAY, OKAY])
    assert guest.platform.pages.end(mine[2]), "what was not added is not mapped"


def test_more_than_there_is_room_for(net: Any) -> None:
    guest = net.guest(be={"staging": 8}, wishes=UNSTAGED)
    _pages, mine = spare(guest, 9)
    assert ask(guest, ADD, 0, grefs(*((gref, 0) for gref in mine)))[0] == INVALID
    assert ask(guest, ADD, 0, grefs(*((gref, 0) for gref in mine[:8])))[0] == OKAY
    assert ask(guest, ADD, 0, grefs((mine[8], 0)))[0] == INVALID
    assert ask(guest, DEL, 0, grefs((mine[3], 0)))[1] == 1
    assert ask(guest, ADD, 0, grefs((mine[8], 0)))[0] == OKAY
    for entries in (513, 0xFFFFFFFF, 0x20000001):
        for kind in (ADD, DEL):
            assert ask(guest, kind, 0, grefs((mine[3], 0)), entries)[0] == INVALID
    assert counters(guest)["persistent_held"] == 8


def test_a_list_that_is_not_there_or_cannot_be_written_to(net: Any) -> None:
    """Who cannot be told which are gone keeps them all."""
    guest = net.guest(wishes=UNSTAGED)
    _pages, mine = spare(guest, 2)
    readonly = guest.platform.pages.grant(control(guest)._pages.frames[1], 0, readonly=True)  # type: ignore[union-attr]
    assert ask(guest, ADD, 0, grefs(*((gref, 0) for gref in mine)))[0] == OKAY
    for gref in (NO_GREF, readonly):
        for kind, want in ((DEL, INVALID), (ADD, INVALID)):
            put(guest, (1, kind, 0, gref, 1))
            assert answers(guest, 1)[0][2] == want
    assert counters(guest)["persistent_held"] == 2
    assert ask(guest, DEL, 0, grefs(*((gref, 0) for gref in mine)))[1:] == (2, [OKAY, OKAY])


def test_taken_back_under_traffic(net: Any) -> None:
    """A page that is on the ring, and in use, is copied from the next packet on."""
    a, b = net.guest(), net.guest()
    _, received = b.vif.queues[0].grefs()
    for round in range(20):
        kind, flags = (ADD, 0) if round % 2 else (DEL, 0)
        for n in range(30):
            a.vif.send(a.frame(b, bytes([round, n]) * 1000))
        assert ask(b, kind, 0, grefs(*((gref, flags) for gref in received)))[0] == OKAY
        for n in range(30):
            assert b.vif.receive(5) == a.frame(b, bytes([round, n]) * 1000)
    assert b.vif.stats()["rx_errors"] == 0


def test_a_buffer_that_is_mapped_read_only_is_not_written_to_that_way(net: Any) -> None:
    a, b = net.guest(), net.guest(wishes=UNSTAGED)
    _, received = b.vif.queues[0].grefs()
    assert ask(b, ADD, 0, grefs(*((gref, netif.GREF_readonly) for gref in received)))[0] == OKAY
    for _ in range(300):
        a.vif.send(a.frame(b, bytes(3000)))
        assert b.vif.receive(5) == a.frame(b, bytes(3000))
    assert counters(b)["persistent_hits"] == 0


@pytest.mark.usefixtures("patient")
def test_the_end_of_a_connection_unmaps_all(net: Any) -> None:
    a = net.guest()
    _pages, mine = spare(a, 1)
    assert ask(a, DEL, 0, grefs(*((gref, 0) for gref in a.vif.queues[0].grefs()[1][:1])))[1] == 1
    assert ask(a, ADD, 0, grefs((mine[0], 0)))[0] == OKAY
    net.dom0.store.write(f"{a.backend}/state", "5")  # the backend closes
    until(lambda: a.vif.connections == 2 and a.vif.state == 4)
    assert a.platform.pages.end(mine[0])
    assert a.vif.stats()["stuck_grants"] == 0
    assert a.vif.staged == LIMIT
    net.daemon.kill()  # and so does its death: Xen unmaps, and packets are copied
    net.daemon.start()
    b = net.guest()

    def heard() -> bool:
        a.vif.send(a.frame(b, b"hello"))
        try:
            return bool(b.vif.receive(0.1))
        except TimeoutError:
            return False

    until(heard)
    b.vif.send(b.frame(a, b"hello"))
    assert a.vif.receive(5) == b.frame(a, b"hello")


def test_a_violation_unmaps_all(net: Any) -> None:
    liar, a, b = net.guest(), net.guest(), net.guest()
    put(liar, ahead=200)
    until(lambda: bool(liar.vif.failure) or liar.vif.connections == 2)
    until(lambda: liar.vif.stats()["stuck_grants"] == 0)
    talk(a, b)


def test_pages_are_unmapped_by_the_worker_that_has_mapped_them() -> None:
    """On Xen each has handles of its own, and the same number means another's page to another."""
    seen = []
    unmap = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)(lambda ctx, ops, n, _: seen.append((ctx, n)) or 0)
    workers, seams, ops = np.zeros(2, WORKER), np.zeros(2, SEAM), np.zeros(4, GRANT_OP)
    tables = Memory(2 * STAGE_SIZE)
    for k in range(2):
        seams[k]["grant_unmap"], seams[k]["grant_ctx"] = ctypes.cast(unmap, ctypes.c_void_p).value, 100 + k
        workers[k]["seam"] = seams.ctypes.data + k * SEAM.itemsize
        table = tables.address + k * STAGE_SIZE
        staging.format_stage(table, 4)
        staging_share.set_owner(table, workers.ctypes.data + k * WORKER.itemsize, 0)
        for gref in range(k + 1):
            staging.insert(table, 8 + gref, 1)
    for k in range(2):
        staging_share.unmap_all(tables.address + k * STAGE_SIZE, ops.ctypes.data)
    assert seen == [(100, 1), (101, 2)]
