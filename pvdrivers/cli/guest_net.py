"""What ``pvdrivers guest --net`` says of a vif."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from pvdrivers.errors import ConfigError, PvError
from pvdrivers.frontends.netfront import Netfront
from pvdrivers.frontends.netfront_keys import Wishes

__all__ = ["NetSpec", "describe_net", "parse_net", "spread"]

_MAPPING = 128  # what any backend with a control ring has room for
_MOST_NAME = 15  # IFNAMSIZ with its zero


@dataclass(frozen=True)
class NetSpec:
    """`bridge` as the backend reads it; `tap` "": none; `queues` None: one a CPU; `wishes`: what it takes.

    `hash`: packets come by the queue that a Toeplitz hash with a key of the guest's own says, not as the backend likes.
    """

    bridge: str
    mac: str = ""
    tap: str = ""
    mtu: int = 1500
    queues: int | None = 1
    hash: bool = False
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
        elif key == "hash":
            if value not in ("on", "off"):
                raise ConfigError(f"--net {text}: hash={value!r} is neither on nor off")
            spec = replace(spec, hash=value == "on")
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
            raise ConfigError(f"--net {text}: {key!r} is not one of csum, gso, hash, mac, mtu, queues, sg, tap")
    return spec


def spread(vif: Netfront) -> None:
    """Have packets come by all queues alike, by a new key. PvError if the backend does not do that."""
    queues = len(vif.queues)
    try:
        vif.set_hash(os.urandom(40), mapping=[n % queues for n in range(_MAPPING)])
    except OSError as error:
        raise PvError(f"hash=on: {error.strerror}") from error


def describe_net(vif: Netfront, spec: NetSpec) -> str:
    """One line: what the vif is, and how it is connected."""
    queues = f"{len(vif.queues)} queue{'s' * (len(vif.queues) > 1)}"
    tap = f", TAP {spec.tap}" if spec.tap else ""
    hash = ", Toeplitz" if spec.hash else ""
    return f"vif {vif.name}: {vif.mac.hex(':')} on {spec.bridge}, {queues}{hash}{tap}"
