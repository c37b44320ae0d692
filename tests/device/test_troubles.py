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
    begun = [r for r in caplog.records if r.getMessage() == "vbd-1-51712: it storms"]
    assert len(begun) == 10, "1, 2, 4 ... 512"
    assert len(caplog.records) == 20, "and the end of each of these"
