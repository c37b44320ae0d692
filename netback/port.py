"""Which port a vif has on the other side, as the toolstack says it: the key `bridge` of its backend directory.

    switch:NAME    a switch of this process, with all other vifs that name it; without NAME it is "pvdrivers"
    null:          nobody: what the guest sends is taken and thrown away
    (no key)       as "switch:"

NAME is of letters, digits, "-", "_" and ".", 32 at the most. A switch is there as long as a vif names it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pvdrivers.device import BackKeys

__all__ = ["DEFAULT_SWITCH", "PortSpec", "parse_port", "port_of"]

DEFAULT_SWITCH = "pvdrivers"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,32}")


@dataclass(frozen=True)
class PortSpec:
    """`kind` is "switch" or "null", `name` that of a switch."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


def parse_port(text: str) -> PortSpec:
    """Raises ValueError, with what there is to choose from."""
    kind, colon, name = text.partition(":")
    if not colon:
        raise ValueError(
            f"{text!r} is no port that is known: a bridge of Linux is not served; there are switch:NAME and null:"
        )
    if kind == "null" and not name:
        return PortSpec(kind, "")
    if kind == "switch":
        name = name or DEFAULT_SWITCH
        if not _NAME.fullmatch(name):
            raise ValueError(f"switch {name!r}: letters, digits, '-', '_' and '.', at most 32")
        return PortSpec(kind, name)
    raise ValueError(f"{text!r} is no port that is known: there are switch:NAME and null:")


def port_of(params: BackKeys) -> PortSpec:
    """The port that a vif's backend directory names. Raises ConfigError naming the key."""
    text = params.str_key("bridge", "switch:")
    try:
        return parse_port(text)
    except ValueError as e:
        raise params.wrong("bridge", str(e)) from None
