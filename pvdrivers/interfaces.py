"""Network interfaces by ioctl: netdevice(7), and Linux, Documentation/networking/tuntap.rst. All raise OSError.

Light, for who must not import netlink: a guest of the demonstration, and netfront's TAP.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

__all__ = ["TSO4", "TSO6", "TSO_ECN", "TUN_CSUM", "TUN_DEVICE", "open_tun", "set_address", "set_hardware_address",
           "set_mtu", "set_tap_carrier", "set_tap_offload", "set_tap_queue", "take_tap", "up"]  # fmt: skip

TUN_DEVICE = "/dev/net/tun"
TUN_CSUM, TSO4, TSO6, TSO_ECN = 1, 2, 4, 8
"""TUN_F_*: what whoever reads a TAP takes."""

_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETQUEUE, _TUNSETCARRIER = 0x400454CA, 0x400454D0, 0x400454D9, 0x400454E2
_IFF_ATTACH_QUEUE, _IFF_DETACH_QUEUE = 0x200, 0x400
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x100, 0x1000, 0x4000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8913, 0x8914, 0x8916, 0x891C
_SIOCSIFMTU, _SIOCSIFHWADDR = 0x8922, 0x8924
_IFF_UP, _ARPHRD_ETHER = 1, 1


def open_tun() -> int:
    """A descriptor that is to become a queue of a TAP, non-blocking."""
    return os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def take_tap(fd: int, name: str, *, several: bool) -> None:
    """Have it a queue of the TAP of that name, which is made if it is not there; packets have a virtio_net_hdr."""
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if several else 0)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))


def set_tap_queue(fd: int, on: bool) -> None:
    """Take a queue out of a TAP of several, so that nothing goes by it, or back in."""
    fcntl.ioctl(fd, _TUNSETQUEUE, struct.pack("16xH22x", _IFF_ATTACH_QUEUE if on else _IFF_DETACH_QUEUE))


def set_tap_offload(fd: int, offload: int) -> None:
    """What its reader takes: TUN_CSUM, TSO4, TSO6, TSO_ECN."""
    fcntl.ioctl(fd, _TUNSETOFFLOAD, offload)


def set_tap_carrier(fd: int, on: bool) -> None:
    """What its host sees of it: a cable, or none. Linux 5.0 and later."""
    fcntl.ioctl(fd, _TUNSETCARRIER, struct.pack("i", on))


def _request(code: int, name: str, argument: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return fcntl.ioctl(sock, code, struct.pack("16s24s", name.encode(), argument))


def up(name: str) -> None:
    """ip link set NAME up."""
    (flags,) = struct.unpack_from("H", _request(_SIOCGIFFLAGS, name, b""), 16)
    _request(_SIOCSIFFLAGS, name, struct.pack("H", flags | _IFF_UP))


def set_mtu(name: str, mtu: int) -> None:
    """ip link set NAME mtu MTU."""
    _request(_SIOCSIFMTU, name, struct.pack("i", mtu))


def set_hardware_address(name: str, mac: bytes) -> None:
    """Before it is up."""
    _request(_SIOCSIFHWADDR, name, struct.pack("H6s", _ARPHRD_ETHER, mac))


def set_address(name: str, address: str, mask: str = "255.255.255.0") -> None:
    """An IPv4 address."""
    for code, text in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, mask)):
        _request(code, name, struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(text)))
