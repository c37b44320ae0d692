"""What the toolstack writes about a vif (xl-network-configuration(5), libxl_nic.c), checked."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pvdrivers.device import BackKeys
from pvdrivers.ethernet import LEAST_MTU, MOST_MTU, mac_bytes

from .control_records import MOST_STAGED
from .port import PortSpec, port_of

__all__ = ["VifSpec", "vif_of"]

_RATE = re.compile(r"([0-9]{1,10}),([0-9]{1,10})")
LEAST_BURST = 131072
"""As Linux has it (tx_add_credit): a packet of any size has to fit in."""
_MOST_MS = 1 << 31
DRAIN_MS, DRAIN_BLIND_MS, STALL_MS = 10000, 30, 60000
"""rx_drain_timeout_msecs of Linux's netback, the same without feature-rx-notify, and rx_stall_timeout_msecs."""


@dataclass(frozen=True)
class VifSpec:
    """`mac` as a number, first byte lowest, 0 if there is none; `queues` 1 to the most that are offered; `staging` is
    how many grefs a queue may have kept mapped."""

    mac: int
    port: PortSpec
    queues: int
    staging: int = MOST_STAGED


@dataclass(frozen=True)
class LiveSpec:
    """What may change while a vif is connected: `rate` in bytes a second (0: no limit), `burst` in bytes, `mtu` 0:
    none, `up` the link, and the time-outs of its rx rings in ms, None: as they are by default."""

    rate: float = 0.0
    burst: int = 0
    mtu: int = 0
    up: bool = True
    drain_ms: int | None = None
    stall_ms: int | None = None


def vif_of(params: BackKeys, most_queues: int) -> VifSpec:
    """The vif of a backend directory. Raises ConfigError naming the key."""
    text = params.str_key("mac", "")
    try:
        mac = int.from_bytes(mac_bytes(text), "little") if text else 0
    except ValueError as e:
        raise params.wrong("mac", str(e)) from None
    queues = params.int_key("queues", most_queues, 1, most_queues)
    return VifSpec(mac, port_of(params), queues, params.int_key("staging", MOST_STAGED, 0, MOST_STAGED))


def parse_rate(text: str) -> tuple[float, int]:
    """libxl's "bytes,microseconds" -> (bytes a second, burst). What comes in one interval may be saved up, and never
    less than LEAST_BURST. Raises ValueError."""
    found = _RATE.fullmatch(text.strip())
    nbytes, usecs = map(int, found.groups()) if found else (0, 0)
    if nbytes == 0 or usecs == 0:
        raise ValueError(f"is {text[:40]!r}, not BYTES,MICROSECONDS, as xl's rate=10MB/s@50ms is written: 500000,50000")
    return nbytes * 1e6 / usecs, max(nbytes, LEAST_BURST)


def live_of(params: BackKeys) -> LiveSpec:
    """What of a vif's backend directory holds at once when it changes. Raises ConfigError naming the key."""
    rate, burst = 0.0, 0
    if text := params.str_key("rate", ""):
        try:
            rate, burst = parse_rate(text)
        except ValueError as e:
            raise params.wrong("rate", str(e)) from None
    mtu = params.int_key("mtu", None, LEAST_MTU, MOST_MTU) if params.has("mtu") else 0
    up = params.str_key("link", "up", ("up", "down")) == "up"
    drain, stall = (
        params.int_key(key, None, 0, _MOST_MS) if params.has(key) else None
        for key in ("rx_drain_timeout_msecs", "rx_stall_timeout_msecs")
    )
    return LiveSpec(rate, burst, mtu, up, drain, stall)
