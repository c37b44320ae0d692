"""A vif as xl writes it (xl-network-configuration(5), parse_nic_config of xl_parse.c), with options of ours beside.

    mac=00:16:3e:12:34:56 bridge=switch:lan        bridge=switch:lan,rate=100Mb/s,mtu=9000,queues=4

What differs from xl: parameters may be joined by commas on the command line, too; without `bridge` it is the switch
that a backend of ours has of itself, and not xenbr0; and no script is run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from .errors import ConfigError
from .ethernet import LEAST_MTU, MOST_MTU, mac_bytes

__all__ = ["XlVif", "new_mac", "parse_mac", "parse_rate", "parse_xl_vif"]

_RATE: Final = re.compile(r"([0-9]+)([GMK]?)([Bb])/s(?:@([0-9]+)([mu]?)s?)?")
_SCALE: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_USECS: Final = {"": 10**6, "m": 10**3, "u": 1}
_INTERVAL: Final = 50_000  # us, as libxlu_vif.c has it
_MOST: Final = (1 << 32) - 1
_MOST_QUEUES: Final = 16
_MOST_DEVID: Final = 255
_SCRIPTS: Final = {"vif-bridge", "/etc/xen/scripts/vif-bridge"}
"""What these do, `bridge` says to a backend of ours. All others would be run by nobody."""


@dataclass(frozen=True)
class XlVif:
    """A vif to be attached. `mac` "": one is to be made. `keys` are for the backend, as libxl writes them."""

    mac: str = ""
    devid: int | None = None
    mtu: int = 1500
    trusted: bool = True
    backend: str = "0"
    """Name or id of the domain that serves it."""
    keys: dict[str, str | int | bytes] = field(default_factory=dict)


def parse_xl_vif(words: Sequence[str]) -> XlVif:
    """Read the parameters of a vif. Raises ConfigError with what is wrong and what is allowed."""
    try:
        return _vif(_values(words))
    except ValueError as e:
        raise ConfigError(f"vif {' '.join(words)!r}: {e}") from None


def _values(words: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for item in filter(None, (item.strip() for word in words for item in word.split(","))):
        name, equals, value = item.partition("=")
        if item in ("trusted", "untrusted"):
            name, value = "trusted", str(int(item == "trusted"))
        elif not equals or name not in _PARAMETERS:
            raise ValueError(f"{item!r} is none of {'=, '.join(_PARAMETERS)}=, trusted, untrusted")
        if values.get(name, value) != value:
            raise ValueError(f"{name} is given twice; keep one")
        if not value:
            raise ValueError(f"{name}= has no value; leave it out, or give it one")
        values[name] = value
    return values


def _vif(values: dict[str, str]) -> XlVif:
    for name, value in values.items():
        if name != "trusted":
            _PARAMETERS[name](value)
    mtu = int(values.get("mtu", 1500))
    keys: dict[str, str | int | bytes] = {"type": "vif"}
    keys |= {name: values[name] for name in ("bridge", "ip", "vifname", "script") if name in values}
    if "gatewaydev" in values or "netdev" in values:
        keys["gatewaydev"] = values.get("gatewaydev", values.get("netdev", ""))
    if "rate" in values:
        keys["rate"] = "{},{}".format(*parse_rate(values["rate"]))
    if mtu != 1500:
        keys["mtu"] = mtu
    if "queues" in values:
        keys["queues"] = int(values["queues"])
    return XlVif(
        parse_mac(values["mac"]) if "mac" in values else "", int(values["devid"]) if "devid" in values else None,
        mtu, values.get("trusted") != "0", values.get("backend", "0"), keys,
    )  # fmt: skip


def parse_mac(text: str) -> str:
    """An address as it is written in xenstore. Raises ValueError for what is none, or that of a group, or of nobody."""
    try:
        mac = mac_bytes(text)
    except ValueError as e:
        raise ValueError(f"mac={e}") from None
    if not any(mac):
        raise ValueError(f"mac={text} is nobody's; leave mac out to have one made")
    return mac.hex(":")


def new_mac() -> str:
    """One of Xen's range (00:16:3e), as libxl makes them."""
    return (b"\0\x16\x3e" + bytes([os.urandom(1)[0] & 0x7F]) + os.urandom(2)).hex(":")


def parse_rate(text: str) -> tuple[int, int]:
    """xl's RATE or RATE@INTERVAL -> (bytes an interval, microseconds of it), as libxlu_vif.c. Raises ValueError."""
    found = _RATE.fullmatch(text)
    if not found:
        raise ValueError(f"rate={text}: written as 10MB/s, 100Mb/s, or 250KB/s@20ms (G, M, K; B bytes, b bits)")
    number, scale, unit, interval, fraction = found.groups()
    usecs = _INTERVAL if interval is None else int(interval) * _USECS[fraction]
    if not 0 < int(number) <= _MOST or not 0 < usecs <= _MOST:
        raise ValueError(f"rate={text}: number and interval (in us) go from 1 to {_MOST}")
    nbytes = int(number) * _SCALE[scale] // (8 if unit == "b" else 1) * usecs // 10**6
    if not nbytes:
        raise ValueError(f"rate={text}: that is less than one byte in {usecs} us; give it a longer interval")
    return nbytes, usecs


def _number(name: str, least: int, most: int) -> Callable[[str], object]:
    def check(text: str) -> None:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
            raise ValueError(f"{name}={text}: a number from {least} to {most}")

    return check


def _type(text: str) -> None:
    if text == "ioemu":
        raise ValueError("type=ioemu: an emulated card is QEMU's, and xl attaches it; type=vif is served here")
    if text != "vif":
        raise ValueError(f"type={text}: must be vif")


def _script(text: str) -> None:
    if text not in _SCRIPTS:
        raise ValueError(f"script={text}: none is run here; say by bridge= where its packets go")


def _model(text: str) -> None:
    raise ValueError(f"model={text} is of an emulated card, which is QEMU's; leave it out")


def _any(text: str) -> None:
    if not text.isprintable() or len(text) > 256:
        raise ValueError(f"{text[:40]!r}...: at most 256 characters, and all of them printable")


_PARAMETERS: Final[dict[str, Callable[[str], object]]] = {
    "type": _type,
    "mac": parse_mac,
    "bridge": _any,
    "ip": _any,
    "script": _script,
    "rate": parse_rate,
    "mtu": _number("mtu", LEAST_MTU, MOST_MTU),
    "backend": _any,
    "vifname": _any,
    "gatewaydev": _any,
    "netdev": _any,
    "model": _model,
    "devid": _number("devid", 0, _MOST_DEVID),
    "queues": _number("queues", 1, _MOST_QUEUES),
}
"""xl's, then ours; each with what refuses a wrong value. `netdev` is what xl once called gatewaydev."""
