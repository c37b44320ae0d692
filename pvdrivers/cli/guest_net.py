"""What ``pvdrivers guest --net`` says of a vif."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from pvdrivers.errors import ConfigError
from pvdrivers.frontends.netfront import Netfront
from pvdrivers.frontends.netfront_keys import Wishes

__all__ = ["NetSpec", "describe_net", "new_mac", "parse_net"]

_MOST_NAME = 15  # IFNAMSIZ with its zero


@dataclass(frozen=True)
class NetSpec:
    """`bridge` as the backend reads it; `tap` "": none; `queues` None: one a CPU; `wishes`: what it takes."""

    bridge: str
    mac: str = ""
    tap: str = ""
    mtu: int = 1500
    queues: int | None = 1
    wishes: Wishes = field(default_factory=Wishes)


def parse_net(text: str) -> NetSpec:
    """BRIDGE[,KEY=VALUE...]. Raises ConfigError naming what is wrong."""
    bridge, *options = text.split(",")
    spec = NetSpec(bridge)
    for option in options:
        key, _, value = option.partition("=")
        if key in ("mtu", "queues"):
            if not (value.isascii() and value.isdigit() and 1 <= int(value) <= 65521):
                raise ConfigError(f"--net {text}: {key}={value!r} is no number from 1 to 65521")
            spec = replace(spec, mtu=int(value)) if key == "mtu" else replace(spec, queues=int(value))
        elif key == "mac":
            spec = replace(spec, mac=value)
        elif key in ("sg", "gso", "csum"):
            if value not in ("0", "1"):
                raise ConfigError(f"--net {text}: {key}={value!r} is neither 0 nor 1")
            on = value == "1"
            what = {"csum4": on, "csum6": on} if key == "csum" else {key: on}
            spec = replace(spec, wishes=replace(spec.wishes, **what))
        elif key == "tap":
            if not value or len(value) > _MOST_NAME or "/" in value:
                raise ConfigError(f"--net {text}: tap={value!r} is no name of an interface (at most {_MOST_NAME})")
            spec = replace(spec, tap=value)
        else:
            raise ConfigError(f"--net {text}: {key!r} is not one of csum, gso, mac, mtu, queues, sg, tap")
    return spec


def new_mac() -> str:
    """One of Xen's range (00:16:3e), as libxl makes them."""
    return (b"\0\x16\x3e" + bytes([os.urandom(1)[0] & 0x7F]) + os.urandom(2)).hex(":")


def describe_net(vif: Netfront, spec: NetSpec) -> str:
    """One line: what the vif is, and how it is connected."""
    queues = f"{len(vif.queues)} queue{'s' * (len(vif.queues) > 1)}"
    tap = f", TAP {spec.tap}" if spec.tap else ""
    return f"vif {vif.name}: {vif.mac.hex(':')} on {spec.bridge}, {queues}{tap}"
