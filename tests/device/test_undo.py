"""Letting go of a connection: what cannot be undone is left behind, and the rest is undone all the same."""

from __future__ import annotations

import errno

import pytest

from pvdrivers.errors import PlatformError
from tests.device.bed import Bed


@pytest.mark.parametrize("error", [PlatformError("no such port"), OSError(errno.ENOENT, "unmap")])
def test_a_step_that_fails_is_one_step(bed: Bed, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    _, _, disk = bed.connected()
    done = []

    def fails() -> None:
        raise error

    disk.undo([lambda: done.append(1), fails, lambda: done.append(3)])
    assert done == [1, 3]
    assert caplog.text.count("vbd-5-51712: while disconnecting") == 1 and str(error) in caplog.text


def test_our_own_fault_is_not_hidden(bed: Bed) -> None:
    _, _, disk = bed.connected()
    with pytest.raises(ZeroDivisionError):
        disk.undo([lambda: 1 // 0])  # type: ignore[list-item]
