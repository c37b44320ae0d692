"""What the toolstack writes about a vif (xl-network-configuration(5), libxl_nic.c), checked."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pvdrivers.device import BackKeys

from .control_records import MOST_STAGED
from .port import PortSpec, port_of

__all__ = ["VifSpec", "vif_of"]

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
MOST_MTU = 65535


@dataclass(frozen=True)
class VifSpec:
    """`mac` as a number, first byte lowest, 0 if there is none; `queues` 1 to the most that are offered; `staging` is
    how many grefs a queue may have kept mapped."""

    mac: int
    port: PortSpec
    queues: int
    staging: int = MOST_STAGED


def parse_mac(text: str) -> int:
    """Raises ValueError for what is no address, and for a group's, which nobody can have."""
    if not _MAC.fullmatch(text):
        raise ValueError(f"{text!r} is no address: six bytes such as 00:16:3e:12:34:56")
    value = int.from_bytes(bytes.fromhex(text.replace(":", "")), "little")
    if value & 1:
        raise ValueError(f"{text!r} is the address of a group: the first byte has to be even")
    return value


def vif_of(params: BackKeys, most_queues: int) -> VifSpec:
    """The vif of a backend directory. Raises ConfigError naming the key."""
    text = params.str_key("mac", "")
    try:
        mac = parse_mac(text) if text else 0
    except ValueError as e:
        raise params.wrong("mac", str(e)) from None
    queues = params.int_key("queues", most_queues, 1, most_queues)
    return VifSpec(mac, port_of(params), queues, params.int_key("staging", MOST_STAGED, 0, MOST_STAGED))
