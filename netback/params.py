"""What the toolstack writes about a vif (xl-network-configuration(5), libxl_nic.c), checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pvdrivers.device import BackKeys
from pvdrivers.errors import ConfigError
from pvdrivers.ethernet import LEAST_MTU, MOST_MTU, mac_bytes

from .control_records import MOST_STAGED
from .port import PortSpec, port_of

__all__ = ["LiveSpec", "VifSpec", "live_of", "vif_of"]

T = TypeVar("T")

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


class _Reading:
    """Keys that are read one by one: `errors` are of those that make no sense, each naming its key."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def get(self, read: Callable[[], T], otherwise: T) -> T:
        """What a key says, or else this."""
        try:
            return read()
        except ConfigError as e:
            self.errors.append(str(e))
            return otherwise


def vif_of(params: BackKeys, most_queues: int) -> tuple[VifSpec | None, list[str]]:
    """The vif of a backend directory, and what makes no sense there; instead of that the vif has what it would have
    without the key. None if it is not even to be known where its packets go."""
    keys = _Reading()
    mac = keys.get(lambda: _mac_of(params), 0)
    queues = keys.get(lambda: params.int_key("queues", most_queues, 1, most_queues), most_queues)
    staging = keys.get(lambda: params.int_key("staging", MOST_STAGED, 0, MOST_STAGED), MOST_STAGED)
    port = keys.get(lambda: port_of(params), None)
    return None if port is None else VifSpec(mac, port, queues, staging), keys.errors


def _mac_of(params: BackKeys) -> int:
    text = params.str_key("mac", "")
    try:
        return int.from_bytes(mac_bytes(text), "little") if text else 0
    except ValueError as e:
        raise params.wrong("mac", str(e)) from None


def parse_rate(text: str) -> tuple[float, int]:
    """libxl's "bytes,microseconds" -> (bytes a second, burst). What comes in one interval may be saved up, and never
    less than LEAST_BURST. Raises ValueError."""
    found = _RATE.fullmatch(text.strip())
    nbytes, usecs = map(int, found.groups()) if found else (0, 0)
    if nbytes == 0 or usecs == 0:
        raise ValueError(f"is {text[:40]!r}, not BYTES,MICROSECONDS, as xl's rate=10MB/s@50ms is written: 500000,50000")
    return nbytes * 1e6 / usecs, max(nbytes, LEAST_BURST)


def live_of(params: BackKeys, before: LiveSpec) -> tuple[LiveSpec, list[str]]:
    """What of a vif's backend directory holds at once when it changes, and what makes no sense there: of that what was
    `before` stays. All that looks at these keys asks here, so that a wrong one has one outcome."""
    keys = _Reading()
    rate, burst = keys.get(lambda: _rate_of(params), (before.rate, before.burst))
    mtu = keys.get(lambda: params.int_key("mtu", 0, LEAST_MTU, MOST_MTU), before.mtu)
    up = keys.get(lambda: params.str_key("link", "up", ("up", "down")) == "up", before.up)
    drain = keys.get(lambda: _ms_of(params, "rx_drain_timeout_msecs"), before.drain_ms)
    stall = keys.get(lambda: _ms_of(params, "rx_stall_timeout_msecs"), before.stall_ms)
    return LiveSpec(rate, burst, mtu, up, drain, stall), keys.errors


def _rate_of(params: BackKeys) -> tuple[float, int]:
    text = params.str_key("rate", "")
    try:
        return parse_rate(text) if text else (0.0, 0)
    except ValueError as e:
        raise params.wrong("rate", str(e)) from None


def _ms_of(params: BackKeys, key: str) -> int | None:
    return params.int_key(key, None, 0, _MOST_MS) if params.has(key) else None
