"""What is said of a device's troubles, and how often."""

from __future__ import annotations

from typing import Any, cast

import pytest

from pvdrivers.troubles import Troubles


def test_what_comes_and_goes_is_logged_ever_more_rarely(caplog: pytest.LogCaptureFixture) -> None:
    """A guest that storms in bursts must not be able to fill a disk with our log; stats have them all."""
    caplog.set_level("INFO")
    troubles = Troubles("vbd-1-51712", cast(Any, None), lambda: None)
    for _ in range(1000):
        troubles.notice("events", "it storms")
        assert troubles.now == {"events": "it storms"}
        troubles.notice("events", "")
        assert troubles.now == {}
    assert troubles.counts == {"events": 1000}
    begun = [r.getMessage() for r in caplog.records if "it storms" in r.getMessage()]
    assert len(begun) == 10 and begun[0] == "vbd-1-51712: it storms", "1, 2, 4 ... 512"
    assert begun[-1] == "vbd-1-51712: it storms (512 so far)"
    assert len(caplog.records) == 20, "and the end of each of these"


def failed(count: int, at: int) -> str:
    return f"{count} of its requests failed; the latest of 512 bytes at byte {at}: its store: Input/output error"


def test_who_connects_anew_for_each_request_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Which byte that is says the guest: each time in other words, which are to fill neither log nor memory."""
    troubles = Troubles("vbd-1-51712", cast(Any, None), lambda: None)
    for n in range(1000):
        troubles.notice("io", failed(1, 512 * n), 1)
        assert troubles.now == {"io": failed(1, 512 * n)}, "stats have them all"
        troubles.over("io")  # connected anew
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 10 and said[0] == f"vbd-1-51712: {failed(1, 0)}", "the first at once"
    assert said[-1] == f"vbd-1-51712: {failed(1, 512 * 511)} (512 so far)"
    kept = [held for held in vars(troubles).values() if isinstance(held, (dict, set))]
    assert sum(map(len, kept)) < 10


def test_requests_that_fail_are_logged_at_powers_of_two(caplog: pytest.LogCaptureFixture) -> None:
    """Of one connection all of them, and after others what is more than there were."""
    troubles = Troubles("vbd-1-51712", cast(Any, None), lambda: None)
    for count in (1, 2, 4, 8, 16):
        troubles.notice("io", failed(count, count), count)
    assert [r.getMessage() for r in caplog.records] == [f"vbd-1-51712: {failed(1 << i, 1 << i)}" for i in range(5)]
    troubles.over("io")
    for count in (1, 2, 4, 8, 16, 32, 64):
        troubles.notice("io", failed(count, count), count)
    assert len(caplog.records) == 7 and caplog.records[-1].getMessage().endswith("(80 so far)")
