"""A network namespace for this process, as root or as anybody, and in it an interface of its own with an address.

Light, and without threads: a user namespace can be entered only while there is one thread (unshare(2)).
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from pathlib import Path

from pvdrivers.errors import PlatformError

__all__ = ["enter", "make_veth"]

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_RTM_NEWLINK, _NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_CREATE, _NLM_F_EXCL = 16, 1, 4, 0x400, 0x200
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 3, 18, 1, 2, 1
_IFINFO = bytes(16)  # struct ifinfomsg: nothing is said of a link that is to be made


def enter() -> None:
    """Be in a new network namespace; who is not root is that by a user namespace. Raises PlatformError."""
    uid, gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) == 0:
        return
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        raise PlatformError(f"no network namespace for user {uid}: {os.strerror(ctypes.get_errno())}")
    try:
        # The same numbers as outside, so that files are whose they were.
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    except OSError as e:
        raise PlatformError(f"no user namespace for user {uid}: {e}") from e


def _attribute(kind: int, data: bytes) -> bytes:
    """struct nlattr, padded to four bytes (netlink(7))."""
    return struct.pack("=HH", 4 + len(data), kind) + data.ljust(-(-len(data) // 4) * 4, b"\0")


def make_veth(name: str, peer: str) -> None:
    """A pair of interfaces: what is sent by one is received by the other. Raises OSError."""
    inner = _IFINFO + _attribute(_IFLA_IFNAME, peer.encode() + b"\0")
    info = _attribute(_IFLA_INFO_KIND, b"veth\0") + _attribute(_IFLA_INFO_DATA, _attribute(_VETH_INFO_PEER, inner))
    body = _IFINFO + _attribute(_IFLA_IFNAME, name.encode() + b"\0") + _attribute(_IFLA_LINKINFO, info)
    flags = _NLM_F_REQUEST | _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.settimeout(5)
        sock.sendto(struct.pack("=IHHII", 16 + len(body), _RTM_NEWLINK, flags, 1, 0) + body, (0, 0))
        (error,) = struct.unpack_from("=i", sock.recv(4096), 16)  # struct nlmsgerr
    if error:
        raise OSError(-error, f"veth {name}: {os.strerror(-error)}")
