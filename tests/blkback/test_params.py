"""What a toolstack has written about a disk."""

from __future__ import annotations

import pytest

from blkback.params import disk_of
from pvdrivers.device import BackKeys, DeviceId
from pvdrivers.errors import ConfigError

IDENT = DeviceId(0, "vbd", 5, 51712, "/local/domain/5/device/vbd/51712")


@pytest.mark.parametrize(("said", "safe"), [(None, False), (b"0", False), (b"1", True)])
@pytest.mark.parametrize("made", [False, True])
def test_direct_io_safe(said: bytes | None, safe: bool, made: bool) -> None:
    """By libxl it is always there; for a disk that we open ourselves, and for what a script has made."""
    keys = {"params": b"/srv/disk.img", "mode": b"w"}
    if made:
        keys |= {"script": b"/etc/xen/scripts/block-own", "physical-device-path": b"/srv/disk.img"}
    if said is not None:
        keys["direct-io-safe"] = said
    spec = disk_of(BackKeys(IDENT, keys))
    assert spec is not None and spec.direct_io_safe is safe and spec.direct == "auto"


def test_direct_io_safe_is_a_number() -> None:
    with pytest.raises(ConfigError, match="direct-io-safe"):
        disk_of(BackKeys(IDENT, {"params": b"/srv/disk.img", "direct-io-safe": b"yes"}))
