"""The packet generator: what it says it has sent and received is what the daemon has seen; it notices wrong bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pvdrivers.cli.stats import snapshot
from pvdrivers.errors import ConfigError, PvError
from pvdrivers.frontends.net_load import Generator, NetPlan, template
from pvdrivers.frontends.net_load_kernels import expected_sum, fill, word_sum
from pvdrivers.frontends.net_load_records import PAGE_STEP
from pvdrivers.frontends.netfront_keys import Wishes

from .conftest import Guest

A, B = b"\0\x16\x3e\0\0\1", b"\0\x16\x3e\0\0\2"
jit_only = pytest.mark.jit_only("a real daemon serves")


def words(first: int, size: int, skip: int) -> int:
    """The naive twin of expected_sum()."""
    return sum((first + w // 512) * PAGE_STEP + w % 512 for w in range(skip // 8, size // 8))


@pytest.mark.parametrize("size", [64, 73, 1500, 4096, 4097, 8192, 9000, 65000, 65535])
@pytest.mark.parametrize("skip", [0, 56, 72])
def test_sums_of_what_is_sent(size: int, skip: int) -> None:
    pages = np.zeros(24 * 4096 // 8, np.int64)
    at = int(pages.ctypes.data)
    fill(at, 24)
    for first in (0, 3, 7):
        want = words(first, size, skip) if size > skip else 0
        if size > skip:
            assert word_sum(at + first * 4096 + skip, (size - skip) // 8) == want
            assert expected_sum(first, size, skip) == want
    pages[512 * 3 + 20] += 1
    if size >= 1500:
        assert word_sum(at + 3 * 4096 + skip, (size - skip) // 8) != words(3, size, skip)


@pytest.mark.parametrize("size", [42, 64, 1500])
def test_headers(size: int) -> None:
    text = template(A, B, size, 0)
    assert text[:14] == B + A + b"\x08\0" and text[14] == 0x45 and text[23] == 17
    assert int.from_bytes(text[16:18], "big") == size - 14 and int.from_bytes(text[38:40], "big") == size - 34
    total = sum(int.from_bytes(text[i : i + 2], "big") for i in range(14, 34, 2))
    assert total % 0xFFFF == 0, "RFC 791: with its checksum the header sums to ones"
    assert template(A, B, 65000, 1448)[23] == 6
    with pytest.raises(ConfigError, match="from 42 to 65535"):
        template(A, B, 41, 0)


@jit_only
@pytest.mark.parametrize(("working_set", "staged"), [(2 << 20, 1024), (4 << 20, 0)])
def test_pages_that_are_kept_mapped(net: Any, working_set: int, staged: int) -> None:
    """All of them, or none if there are more than the backend keeps; then no packet takes a grant copy."""
    a, b = (net.guest(wishes=Wishes(staging=False), memory_mib=32) for _ in range(2))
    with generator(a, b, working_set=working_set, staging=True) as load:
        assert load.staged == staged
        load.run(NetPlan([(0, 1)], 9000, 0, seconds=0.5))  # netfront's own pages are on the ring first
        before = copies(net, a, b)
        result = load.run(NetPlan([(0, 1)], 9000, 0, look="all", seconds=0.2))
        assert result.received > 20 and (result.lost, result.errors, result.wrong) == (0, 0, 0)
        assert (copies(net, a, b) == before) == bool(staged)


def copies(net: Any, *guests: Guest) -> int:
    names = {guest.name for guest in guests}
    return sum(q["grants_copied"] for d in snapshot(net.run_dir) if d["device"] in names for q in d["queues"])


def generator(*guests: Guest, **options: Any) -> Generator:
    return Generator([guest.vif for guest in guests], **options)


@jit_only
@pytest.mark.parametrize(
    ("size", "gso"), [(60, 0), (64, 0), (1500, 0), (4096, 0), (9000, 0), (9000, 1448), (65000, 1448)]
)
@pytest.mark.parametrize("look", ["sample", "all"])
def test_what_it_says_is_what_came(net: Any, size: int, gso: int, look: str) -> None:
    a, b = net.guest(), net.guest()
    with generator(a, b) as load:
        plan = NetPlan([(0, 1), (1, 0)], size, gso, look=look, seconds=0.2)
        first, second = load.run(plan), load.run(plan)
        for result in (first, second):
            assert result.sent >= result.received > 20 and result.sent - result.received <= 512
            assert (result.lost, result.errors, result.wrong) == (0, 0, 0)
            assert result.received_bytes == result.received * size
        assert first.hist.sum() > 0 or size < 64, "below 64 bytes there is no room for a stamp"
        counted = a.counted("received") + b.counted("received")
        assert counted == a.counted("sent") + b.counted("sent") >= first.received + second.received
        assert a.counted("dropped") + b.counted("dropped") == 0


@jit_only
def test_wrong_bytes_are_seen(net: Any) -> None:
    a, b = net.guest(), net.guest()
    with generator(a, b) as load:
        lane = load._lanes[0][0]
        fills = lane.fill

        def spoiled() -> None:
            fills()
            lane.send_from.view[4096 + 777] ^= 1  # in the second page of the first packet

        lane.fill = spoiled  # type: ignore[method-assign]
        result = load.run(NetPlan([(0, 1)], 65000, 1448, look="all", seconds=0.2))
        assert 0 < result.wrong < result.received, "one packet of the sixteen that the pages hold"


@jit_only
def test_a_larger_working_set_and_queues(net: Any) -> None:
    a, b = net.guest(memory_mib=40, queues=2), net.guest(memory_mib=40, queues=2)
    with generator(a, b, working_set=8 << 20) as load:
        assert load.working_set == 8 << 20
        result = load.run(NetPlan([(0, 1)], 1500, streams=64, look="all", seconds=0.3))
        assert result.received > 1024 and (result.wrong, result.errors) == (0, 0)
    per_queue = [queue["received"] for queue in b.vif.stats()["queues"]]
    assert len(per_queue) == 2


@jit_only
def test_elsewhere_and_nobody(net: Any) -> None:
    """A sender whose receiver is another process takes no notice of it; what is lost there is seen from both ends."""
    a, b, c = net.guest(), net.guest(), net.guest("null:")
    with generator(a) as load:
        sent = load.run(NetPlan([(0, -1)], to=b.mac.hex(":"), seconds=0.1)).sent
        assert sent > 256
    waiting = a.counted("sent") - b.counted("received") - b.counted("dropped")
    assert b.counted("received") >= 256 and 0 <= waiting <= 8192  # in half a ring of pages
    with generator(c) as load:
        result = load.run(NetPlan([(0, -1)], seconds=0.1))
        assert result.received == 0 and result.sent >= result.answered > 256


@jit_only
def test_one_at_a_time(net: Any) -> None:
    a, b = net.guest(), net.guest()
    with generator(a, b) as load:
        result = load.run(NetPlan([(0, 1)], on_way=1, look="headers", seconds=0.2))
        assert result.hist.sum() == result.received > 10 and result.sent - result.received <= 1


@jit_only
def test_what_cannot_be(net: Any) -> None:
    a, b = net.guest(), net.guest()
    with generator(a, b) as load:
        for paths, look, said in (([(0, 1), (0, 1)], "all", "one path"), ([(0, 1)], "hard", "not one of sample")):
            with pytest.raises(ConfigError, match=said):
                load.run(NetPlan(paths, look=look))
        net.dom0.store.write(f"{a.backend}/online", 0)
        net.dom0.store.write(f"{a.backend}/state", 5)
        with pytest.raises(PvError):
            for _ in range(50):
                load.run(NetPlan([(0, 1)], seconds=0.2))
