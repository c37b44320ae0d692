"""Whether a packet is larger than an MTU. Pure: looks at private bytes only, total over them.

Tags do not count, as in Linux (is_skb_forwardable). Of a packet of many segments it is the segments that are asked
about, each with all headers (skb_gso_validate_network_len): whoever is behind the port gets them, or cuts it into them.
"""

from __future__ import annotations

from rings.atomics import i64, load8
from rings.frame import ETHERNET, headers
from rings.jit import inline, kernel

from .cut import header_size
from .records import packet_at, port_at

_TAG = 4


@inline
def _tags(data: int) -> int:
    """Bytes of tags, of a packet that is larger than any MTU: there are as many bytes."""
    at = data + 12
    nbytes = i64(0)
    for _ in range(2):
        first, second = i64(load8(at)), i64(load8(at + 1))
        if (first == 0x81 and second == 0) or (first == 0x88 and second == 0xA8):
            nbytes += _TAG
            at += _TAG
    return nbytes


@kernel
def largest_segment(pa: int) -> int:
    """Bytes of the largest packet that one of many segments stands for: its headers, and GSO's size. Where the headers
    are not to be found, what is known of them: that there is one of Ethernet."""
    packet = packet_at(pa)
    data, have = packet["data"], packet["have"]
    header = i64(header_size(data, have, headers(data, have), packet["gso_type"]))
    return min(max(header, ETHERNET) + packet["gso_size"], packet["size"])


@kernel
def fits(pa: int, porta: int) -> bool:
    """Whether a packet is not larger than the MTU of the vif behind a port."""
    packet = packet_at(pa)
    most, size = port_at(porta)["most"], packet["size"]
    if most == 0 or size <= most:
        return True
    if packet["gso_size"] != 0:
        size = i64(largest_segment(pa))
    return size <= most or size <= most + _tags(packet["data"])
