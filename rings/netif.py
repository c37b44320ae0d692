"""The network protocol as Xen's public/io/netif.h declares it. One layout for all guests: nothing in it needs 64 bits.

Three rings, each of one page: tx (packets from the guest), rx (buffers of the guest, answered with packets to it) and
ctrl. A packet is a chain of slots. A tx chain is

    request     size of the WHOLE packet; its own share is what the others leave
    extra ...   if NETTXF_extra_info: EXTRA records in slots of their own, while XEN_NETIF_EXTRA_FLAG_MORE
    request ... while NETTXF_more_data: size of this fragment

and an rx chain the same with responses, where each has the bytes of its own slot, and stands in the slot that its
request had: Linux's netfront does not look at the id.

The structs stand below once, in C; tests/rings holds the dtypes against Debian's headers.
"""

from __future__ import annotations

import numpy as np

from .atomics import i64, records, store32, store64
from .cstruct import dtypes
from .jit import inline, kernel

NR_SLOTS_MIN = 18
"""XEN_NETIF_NR_SLOTS_MIN: a backend takes chains of at least so many requests."""
MAX_TX_SIZE = 0xFFFF
"""XEN_NETIF_MAX_TX_SIZE: bytes in a packet."""

TXF_csum_blank, TXF_data_validated, TXF_more_data, TXF_extra_info = 1, 2, 4, 8
# The first two the other way round.
RXF_data_validated, RXF_csum_blank, RXF_more_data, RXF_extra_info, RXF_gso_prefix = 1, 2, 4, 8, 16

RSP_OKAY, RSP_ERROR, RSP_DROPPED = 0, -1, -2
RSP_NULL = 1
"""The answer to a slot that held an extra."""

EXTRA_NONE, EXTRA_GSO, EXTRA_MCAST_ADD, EXTRA_MCAST_DEL, EXTRA_HASH = 0, 1, 2, 3, 4
EXTRA_XDP = 5
"""Linux only (include/xen/interface/io/netif.h): headroom that a frontend asked for by `xdp-headroom`."""
EXTRA_FLAG_MORE = 1
GSO_NONE, GSO_TCPV4, GSO_TCPV6 = 0, 1, 2

HASH_IPV4, HASH_IPV4_TCP, HASH_IPV6, HASH_IPV6_TCP = 1, 2, 4, 8
"""XEN_NETIF_CTRL_HASH_TYPE_*, as flags; in an EXTRA_HASH the number of the bit."""
HASH_ALL = HASH_IPV4 | HASH_IPV4_TCP | HASH_IPV6 | HASH_IPV6_TCP
HASH_ALGORITHM_NONE, HASH_ALGORITHM_TOEPLITZ = 0, 1

(CTRL_INVALID, CTRL_GET_HASH_FLAGS, CTRL_SET_HASH_FLAGS, CTRL_SET_HASH_KEY, CTRL_GET_HASH_MAPPING_SIZE,
 CTRL_SET_HASH_MAPPING_SIZE, CTRL_SET_HASH_MAPPING, CTRL_SET_HASH_ALGORITHM, CTRL_GET_GREF_MAPPING_SIZE,
 CTRL_ADD_GREF_MAPPING, CTRL_DEL_GREF_MAPPING) = range(11)  # fmt: skip
CTRL_SUCCESS, CTRL_NOT_SUPPORTED, CTRL_INVALID_PARAMETER, CTRL_BUFFER_OVERFLOW = range(4)
GREF_readonly = 1

_STRUCTS = """
typedef uint32_t grant_ref_t;

struct netif_tx_request { grant_ref_t gref; uint16_t offset, flags, id, size; };
struct netif_tx_response { uint16_t id; int16_t status; };
struct netif_rx_request { uint16_t id, pad; grant_ref_t gref; };
struct netif_rx_response { uint16_t id, offset, flags; int16_t status; };
struct xen_netif_ctrl_request { uint16_t id, type; uint32_t data[3]; };
struct xen_netif_ctrl_response { uint16_t id, type; uint32_t status, data; };
struct xen_netif_gref { grant_ref_t ref; uint16_t flags, status; };

struct extra_gso { uint8_t type, flags; uint16_t size; uint8_t gso_type, pad; uint16_t features; };
struct extra_mcast { uint8_t type, flags; uint8_t addr[6]; };
struct extra_hash { uint8_t type, flags; uint8_t hash_type, algorithm; uint8_t value[4]; };
struct extra_xdp { uint8_t type, flags; uint16_t headroom; uint16_t pad[2]; };
"""

TX_REQUEST, TX_RESPONSE, RX_REQUEST, RX_RESPONSE, CTRL_REQUEST, CTRL_RESPONSE, GREF = dtypes(
    _STRUCTS, "netif_tx_request", "netif_tx_response", "netif_rx_request", "netif_rx_response",
    "xen_netif_ctrl_request", "xen_netif_ctrl_response", "xen_netif_gref",
)  # fmt: skip
GSO, MCAST, HASH, XDP = dtypes(_STRUCTS, "extra_gso", "extra_mcast", "extra_hash", "extra_xdp")
"""struct netif_extra_info, once for each member of its union."""
EXTRA_SIZE = 8

TX_ENTRY_SIZE, RX_ENTRY_SIZE, CTRL_ENTRY_SIZE = 12, 8, 16
"""Bytes in a slot: 256, 256 and 128 of them in a page."""

# Keys in xenstore, as netif.h lists them. Written by the back end:
KEY_MAX_QUEUES = "multi-queue-max-queues"
KEY_SPLIT_EVENTS = "feature-split-event-channels"
KEY_RX_COPY = "feature-rx-copy"
KEY_RX_FLIP = "feature-rx-flip"
KEY_CTRL_RING = "feature-ctrl-ring"
KEY_MCAST = "feature-multicast-control"
KEY_DYNAMIC_MCAST = "feature-dynamic-multicast-control"
KEY_XDP_HEADROOM = "feature-xdp-headroom"
KEY_CARRIER = "carrier"
# By both ends:
KEY_SG = "feature-sg"
KEY_GSO_TCPV4 = "feature-gso-tcpv4"
KEY_GSO_TCPV6 = "feature-gso-tcpv6"
KEY_IPV6_CSUM = "feature-ipv6-csum-offload"
KEY_NO_CSUM = "feature-no-csum-offload"
# By the front end:
KEY_NUM_QUEUES = "multi-queue-num-queues"
KEY_TX_RING_REF = "tx-ring-ref"
KEY_RX_RING_REF = "rx-ring-ref"
KEY_EVENT_CHANNEL = "event-channel"
KEY_EVENT_CHANNEL_TX = "event-channel-tx"
KEY_EVENT_CHANNEL_RX = "event-channel-rx"
KEY_REQUEST_RX_COPY = "request-rx-copy"
KEY_RX_NOTIFY = "feature-rx-notify"
KEY_REQUEST_MCAST = "request-multicast-control"
KEY_CTRL_RING_REF = "ctrl-ring-ref"
KEY_EVENT_CHANNEL_CTRL = "event-channel-ctrl"
KEY_REQUEST_XDP_HEADROOM = "xdp-headroom"


@inline
def put_tx_response(slot: int, id: int, status: int) -> None:
    """struct netif_tx_response. The 8 bytes of the slot behind it are the guest's own request, and stay."""
    store32(slot, np.uint32((id & 0xFFFF) | (status & 0xFFFF) << 16))


@inline
def put_rx_response(slot: int, id: int, offset: int, flags: int, status: int) -> None:
    """struct netif_rx_response: all of the slot. `status` is a number of bytes, or one of RSP_*."""
    store64(slot, (id & 0xFFFF) | (offset & 0xFFFF) << 16 | (flags & 0xFFFF) << 32 | (status & 0xFFFF) << 48)


@inline
def hash_extra(known: int) -> int:
    """struct extra_hash as one number, of a hash with its type (HASH_*) above its 32 bits; its flags are 0."""
    kind = known >> 32
    number = 0 if kind == HASH_IPV4 else 1 if kind == HASH_IPV4_TCP else 2 if kind == HASH_IPV6 else 3
    return EXTRA_HASH | i64(number) << 16 | HASH_ALGORITHM_TOEPLITZ << 24 | (known & 0xFFFFFFFF) << 32


@inline
def known_hash(extra: int) -> int:
    """The other way round: what a struct extra_hash, as one number, says; 0 if its type or algorithm is none."""
    number = extra >> 16 & 0xFF
    if number > 3 or extra >> 24 & 0xFF != HASH_ALGORITHM_TOEPLITZ:
        return i64(0)
    return (extra >> 32 & 0xFFFFFFFF) | i64(1) << (32 + number)


_U1 = np.dtype(np.uint8)


@inline
def _byte(base: int, size: int, k: int) -> int:
    return i64(records(base, size, _U1)[k]) if k < size else i64(0)


@kernel
def toeplitz(key: int, key_size: int, data: int, size: int) -> int:
    """The Toeplitz hash of `size` bytes at `data`, 32 bits; a key is as if followed by zeros (netif.h,
    "XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ")."""
    found = np.uint32(0)
    window = np.uint64(0)  # the 64 bits of the key that begin with the one for the current bit
    for k in range(8):
        window = np.uint64(window << np.uint64(8)) | np.uint64(_byte(key, key_size, k))
    for k in range(size):
        byte = _byte(data, size, k)
        for bit in range(7, -1, -1):
            if byte >> bit & 1:
                found = np.uint32(found ^ np.uint32(window >> np.uint64(32)))
            window = np.uint64(window << np.uint64(1))
        window = np.uint64(window | np.uint64(_byte(key, key_size, k + 8)))
    return i64(found)
