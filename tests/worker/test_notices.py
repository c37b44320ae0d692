"""Each trouble of a device's rings is told once, and so is its end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pvdrivers.worker.notices import Notices
from pvdrivers.worker.records import RING


@dataclass
class Ring:
    device: object
    record: np.void


def test_once_a_device_each_way() -> None:
    rings, notices = np.zeros(3, RING), Notices()
    disk, other = object(), object()
    of = [Ring(device, record) for device, record in zip((disk, disk, other), rings)]
    assert list(notices.look(of)) == []
    rings["limit"] = -13, -13, 0
    ((device, kind, text, times),) = notices.look(of)
    assert device is disk and (kind, times) == ("grants", 1)
    assert "GNTST -13" in text and "gnttab_max_maptrack_frames" in text
    rings["limit"] = -13, 0, -13
    assert [(d is other, k) for d, k, _, _ in notices.look(of)] == [(True, "grants")]
    rings["limit"] = 0, 0, -13
    assert list(notices.look(of)) == [(disk, "grants", "", 0)]
    assert list(notices.look(of[:2])) == [], "who is gone is not spoken of"
    rings["limit"] = -13, 0, 0
    assert [d is disk for d, *_ in notices.look(of)] == [True], "each time"
    rings["storming"] = 0, 1, 0
    ((device, kind, text, _),) = notices.look(of)
    assert device is disk and kind == "events" and "10 times a second" in text
    again = Ring(disk, rings[1])
    assert [kind for _, kind, *_ in notices.look([of[0], again])] == ["events"], "a reconnect in the middle of a storm"



def test_requests_that_fail_are_told_at_powers_of_two() -> None:
    rings, notices = np.zeros(1, RING), Notices()
    ring = Ring(object(), rings[0])
    said = []
    for count in range(1, 10):
        rings["failures"] = count
        if count & (count - 1) == 0:
            rings["failed_res"], rings["failed_at"], rings["failed_bytes"] = -5, 4096 * count, 512
        said += [(text, times) for _, kind, text, times in notices.look([ring]) if kind == "io"]
    assert [times for _, times in said] == [1, 2, 4, 8]
    assert "of 512 bytes at byte 32768: its store: Input/output error" in said[-1][0]
    assert "8 of its requests failed" in said[-1][0]
    rings["failed_gntst"] = -3
    ((_, _, text, _),) = notices.look([ring])
    assert "GNTST -3" in text
