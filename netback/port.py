"""Which port a vif has on the other side, as the toolstack says it: the key `bridge` of its backend directory.

    switch:NAME    a switch of this process, with all other vifs that name it; without NAME it is "pvdrivers"
    tap:NAME       a TAP of that name, which the daemon makes
    BRIDGE         (no colon) a bridge of Linux: a TAP of the name that Linux's netback would have, on that bridge
    packet:IFACE   an interface that is there: a packet socket on it
    null:          nobody: what the guest sends is taken and thrown away
    (no key)       as "switch:"

Options follow, each behind a "," or a ";" (xl takes a "," for its own). NAME of a switch is of letters, digits, "-",
"_" and ".", 32 at the most.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

from pvdrivers.device import BackKeys
from pvdrivers.ethernet import LEAST_MTU, MOST_MTU

__all__ = ["DEFAULT_SWITCH", "PortSpec", "parse_port", "parse_uplink", "port_of"]

DEFAULT_SWITCH = "pvdrivers"
MOST_VLAN = 4094
_NAME = re.compile(r"[A-Za-z0-9._-]{1,32}")
_INTERFACE = re.compile(r"[^\s/:,;]{1,15}")  # IFNAMSIZ with its zero; dev_valid_name() of Linux
_SPACE = re.compile(r"[A-Za-z0-9._@+-]{1,64}")
_CHOICE = "there are switch:NAME, tap:NAME, packet:INTERFACE, null:, and the name of a bridge of Linux"
_OPTIONS = {
    "switch": ("vlan", "trunk"),
    "tap": ("bridge", "netns", "ip"),
    "packet": ("netns",),
    "bridge": ("netns",),
    "null": (),
}
_OF_UPLINKS = ("vlan", "trunk", "mtu")


@dataclass(frozen=True)
class PortSpec:
    """`kind` is "switch", "tap", "packet", "bridge" or "null".

    `name` is that of the switch, of the TAP or of the interface; of kind "bridge" it is "", and given by whoever makes
    the TAP. `vlan` 0: none. `trunk` lists the VLANs of a trunk, None if it is none.
    """

    kind: str
    name: str
    bridge: str = ""
    netns: str = ""
    ips: tuple[str, ...] = ()
    vlan: int = 0
    trunk: frozenset[int] | None = None
    mtu: int | None = None

    def __str__(self) -> str:
        if self.kind == "bridge":
            return self.bridge
        return f"{self.kind}:{self.name}"


def parse_uplink(text: str) -> tuple[str, PortSpec]:
    """SWITCH=PORT of `serve --uplink`: the switch, and a port that leads out of it. Raises ValueError."""
    switch, equals, port = text.partition("=")
    if not equals or not _NAME.fullmatch(switch):
        raise ValueError(f"{text!r} is not SWITCH=PORT, with a switch of letters, digits, '-', '_' and '.'")
    spec = parse_port(port, uplink=True)
    if spec.kind not in ("tap", "packet", "bridge"):
        raise ValueError(f"{text!r}: an uplink is tap:NAME, packet:INTERFACE or the name of a bridge of Linux")
    if spec.kind == "bridge":
        spec = replace(spec, name=f"pv-{switch}"[:15])
    return switch, spec


def parse_port(text: str, *, uplink: bool = False) -> PortSpec:
    """Raises ValueError, with what there is to choose from."""
    first, *options = re.split("[,;]", text)
    kind, colon, name = first.partition(":")
    if not colon:
        kind, name = "bridge", first
    if kind not in _OPTIONS or (kind == "null" and name):
        raise ValueError(f"{text!r} is no port that is known: {_CHOICE}")
    if kind == "switch":
        name = name or DEFAULT_SWITCH
        if not _NAME.fullmatch(name):
            raise ValueError(f"switch {name!r}: letters, digits, '-', '_' and '.', at most 32")
    elif kind != "null":
        _interface(name)
    spec = PortSpec(kind, "", bridge=name) if kind == "bridge" else PortSpec(kind, name)
    for option in options:
        key, _, value = option.partition("=")
        known = (*_OPTIONS[kind], *(_OF_UPLINKS if uplink else ()))
        if key not in known:
            there = f"there are {', '.join(known)}" if known else "there are none"
            raise ValueError(f"{text!r}: {key!r} is no option of a {kind} port; {there}")
        spec = _with(spec, key, value)
    if spec.vlan and spec.trunk is not None:
        raise ValueError(f"{text!r}: a port is of one VLAN (vlan), or a trunk of some, not both")
    return spec


def _interface(name: str) -> str:
    if not _INTERFACE.fullmatch(name) or name in (".", ".."):
        raise ValueError(f"{name!r} is no name of an interface: 1 to 15 characters, none of them '/', ':' or a space")
    return name


def _with(spec: PortSpec, key: str, value: str) -> PortSpec:
    if key == "bridge":
        return replace(spec, bridge=_interface(value))
    if key == "netns":
        if not _SPACE.fullmatch(value) or value.startswith("."):
            raise ValueError(f"netns={value!r} is no name of a network namespace, as `ip netns list` has them")
        return replace(spec, netns=value)
    if key == "vlan":
        return replace(spec, vlan=_vlan(value))
    if key == "trunk":
        return replace(spec, trunk=_vlans(value))
    if key == "mtu":
        if not (value.isascii() and value.isdigit() and len(value) < 6 and LEAST_MTU <= int(value) <= MOST_MTU):
            raise ValueError(f"mtu={value!r} is not from {LEAST_MTU} to {MOST_MTU}")
        return replace(spec, mtu=int(value))
    try:
        address = ipaddress.ip_interface(value)
    except ValueError:
        raise ValueError(f"ip={value!r} is no address with a length, such as 10.0.0.1/24") from None
    return replace(spec, ips=(*spec.ips, str(address)))


def _vlan(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MOST_VLAN):
        raise ValueError(f"vlan {text!r} is not from 1 to {MOST_VLAN}")
    return int(text)


def _vlans(text: str) -> frozenset[int]:
    """ "" is all of them; else numbers and ranges with "+" between: 5+10-20."""
    if not text:
        return frozenset(range(1, MOST_VLAN + 1))
    found: set[int] = set()
    for part in text.split("+"):
        first, dash, last = part.partition("-")
        low = _vlan(first)
        high = _vlan(last) if dash else low
        if low > high:
            raise ValueError(f"trunk={text!r}: {part} is no range")
        found.update(range(low, high + 1))
    return frozenset(found)


def port_of(params: BackKeys) -> PortSpec:
    """The port that a vif's backend directory names. Raises ConfigError naming the key."""
    text = params.str_key("bridge", "switch:")
    try:
        spec = parse_port(text)
        if spec.kind != "bridge":
            return spec
        ident = params.device
        name = params.str_key("vifname", "") or f"vif{ident.domid}.{ident.devid}"
        return replace(spec, name=_interface(name))
    except ValueError as e:
        raise params.wrong("bridge", str(e)) from None
