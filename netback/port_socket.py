"""Reading a packet socket: the kernel has taken a packet's VLAN tag off and says it beside, so it is put back.

packet(7): PACKET_AUXDATA, struct tpacket_auxdata (Linux, include/uapi/linux/if_packet.h). Linux takes tags off before a
packet socket sees the packet, whether the hardware has (net/core/dev.c: skb_vlan_untag) or not.
"""

from __future__ import annotations

import numpy as np

from pvdrivers.syscalls import NR_RECVMSG, syscall
from rings.atomics import i64, load16, load32, records, store16, store32
from rings.frame import ETHERNET
from rings.jit import kernel
from rings.vnet import VNET_HEADER, VNET_SIZE

from .records import MOST_BYTES, packet_at

SOCKET_MESSAGE = np.dtype(
    [
        # struct msghdr
        ("name", "i8"),
        ("name_size", "i8"),
        ("iov", "i8"),  # address of `base`
        ("n_iov", "i8"),
        ("control", "i8"),  # address of `ancillary`
        ("control_size", "i8"),
        ("flags", "i8"),
        # struct iovec
        ("base", "i8"),
        ("length", "i8"),
        # struct cmsghdr, then struct tpacket_auxdata
        ("ancillary", "u1", (64,)),
    ],
    align=True,
)
"""What recvmsg(2) wants, and where it puts it. One a queue."""
IOV_AT: int = SOCKET_MESSAGE.fields["base"][1]  # type: ignore[index]
CONTROL_AT: int = SOCKET_MESSAGE.fields["ancillary"][1]  # type: ignore[index]
CONTROL_SIZE = 64
_DATA_AT = CONTROL_AT + 16
_SOL_PACKET, _PACKET_AUXDATA = 263, 8
_STATUS_AT, _TCI_AT, _TPID_AT = 0, 16, 18
_VLAN_VALID, _TPID_VALID, _CSUM_VALID = 0x10, 0x40, 0x80
_8021Q = 0x0081  # as it lies in memory
_TAG = 4


@kernel
def _put_back(pa: int, message: int, size: int) -> int:
    """The tag between the addresses and the type; the header before the packet goes with it."""
    packet = packet_at(pa)
    at = packet["data"]
    for k in range(0, VNET_SIZE + 12, 2):
        store16(at - VNET_SIZE - _TAG + k, load16(at - VNET_SIZE + k))
    packet["data"] = at - _TAG
    tpid = i64(_8021Q)
    if i64(load32(message + _DATA_AT + _STATUS_AT)) & _TPID_VALID != 0:
        type = i64(load16(message + _DATA_AT + _TPID_AT))
        tpid = type >> 8 | (type & 0xFF) << 8
    tci = i64(load16(message + _DATA_AT + _TCI_AT))
    store32(at + 12 - _TAG, np.uint32(tpid | (tci >> 8 | (tci & 0xFF) << 8) << 16))
    header = records(at - _TAG - VNET_SIZE, 1, VNET_HEADER)[0]
    if i64(header["csum_start"]) != 0:
        header["csum_start"] = i64(header["csum_start"]) + _TAG
    return size + _TAG


@kernel
def read_socket(fd: int, message: int, pa: int) -> int:
    """Read a packet and its header to before PACKET.data, which moves if it had a tag. Bytes of both, or -errno."""
    packet = packet_at(pa)
    m = records(message, 1, SOCKET_MESSAGE)[0]
    m["base"], m["length"] = packet["data"] - VNET_SIZE, MOST_BYTES + VNET_SIZE
    m["control_size"], m["flags"] = CONTROL_SIZE, 0
    size = i64(syscall(NR_RECVMSG, fd, message, 0, 0, 0, 0))
    if size < VNET_SIZE + ETHERNET or m["control_size"] < 16 + 20:
        return size
    # struct cmsghdr: its length in 8 bytes, level, type
    level, kind = i64(load32(message + CONTROL_AT + 8)), i64(load32(message + CONTROL_AT + 12))
    if level != _SOL_PACKET or kind != _PACKET_AUXDATA:
        return size
    if i64(load32(message + _DATA_AT + _STATUS_AT)) & _VLAN_VALID != 0:
        return i64(_put_back(pa, message, size))
    return size
