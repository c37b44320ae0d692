"""The network backend's records: what a packet turned out to be, and the ports and the switch between them."""

from __future__ import annotations

from typing import Any

import numpy as np

from rings.atomics import records
from rings.jit import inline
from rings.netif import GSO_TCPV4, GSO_TCPV6, NR_SLOTS_MIN

MAX_SLOTS = NR_SLOTS_MIN
"""Requests of a packet, extras not counted; with more it is dropped."""
FATAL_SLOTS = 20
"""With more than so many the device is closed (`fatal_skb_slots` of Linux's netback)."""
MIN_SIZE = 14
"""Bytes of an Ethernet header; a packet with less is refused."""

# PACKET.verdict
P_SEND = 0  # its fragments are to be fetched and sent
P_CONTROL = 1  # a multicast address to add or to remove; there are no data
P_REFUSE = 2  # all its requests are answered with PACKET.status
P_FATAL = 3  # the guest breaks the protocol: its device is closed

# PACKET.fault of P_FATAL, see FAULTS
F_NO_EXTRA, F_EXTRA_TYPE, F_CUT, F_SLOTS, F_PAGE, F_GSO_SIZE, F_GSO_TYPE = range(1, 8)
FAULTS = {
    F_NO_EXTRA: "an extra is announced, and not there",
    F_EXTRA_TYPE: "an extra of a type that there is not",
    F_CUT: "a packet that goes on behind the last request",
    F_SLOTS: f"a packet of more than {FATAL_SLOTS} requests",
    F_PAGE: "a fragment that crosses the end of its page",
    F_GSO_SIZE: "a GSO packet with segments of size 0",
    F_GSO_TYPE: "a GSO type that there is not",
}

FRAGMENT = np.dtype([("gref", "u4"), ("offset", "u2"), ("length", "u2"), ("page", "i8")], align=True)
"""Checked: `length` bytes, 1 to 4096, at `offset` in the page behind `gref`, which is mapped at `page`, 0 if it is not:
so this is of one pass. Sixteen bytes."""

PACKET = np.dtype(
    [
        ("verdict", "i8"),
        ("status", "i8"),  # NETIF_RSP_* for its requests
        ("fault", "i8"),
        ("slots", "i8"),  # on the ring, extras and all
        ("extras", "i8"),  # ... those of extras: the ones behind the first
        ("size", "i8"),  # bytes of the packet
        ("flags", "i8"),  # NETTXF_* of its first request
        ("gso_type", "i8"),
        ("gso_size", "i8"),
        ("mcast", "i8"),  # EXTRA_MCAST_ADD or _DEL, 0 neither
        ("mcast_addr", "i8"),  # ... and the address, first byte lowest
        ("said", "i8"),  # its hash, by its sender: 32 bits, above them a type (HASH_*), 0 none
        ("tell", "i8"),  # ... and what its receiver is told, in the same way
        # Filled in behind `plan`: where its bytes are, and what they say.
        ("domid", "i8"),  # whose grefs its fragments name
        ("stage", "i8"),  # address of the STAGE of these, 0 if there is none
        ("data", "i8"),  # address of a private copy of its first bytes: the only ones that are ever looked at
        ("have", "i8"),  # how many these are; the others go from page to page
        ("want", "i8"),  # ... and are to be
        ("last_op", "i8"),  # where its copies end in the batch that fetches them
        ("fill", "i8"),  # a receiver wants its checksum complete
        ("at", "i8"),  # its first slot, of those that this pass has copied
        ("csum", "i8"),  # CSUM_*, of rings.vnet
        ("src", "i8"),  # addresses, first byte lowest
        ("dst", "i8"),
        ("l3", "i8"),  # 4 or 6, 0 if it is neither
        ("ip", "i8"),  # where that header begins
        ("l4", "i8"),  # where TCP or UDP begins, 0 if it does not
        ("csum_at", "i8"),  # ... and where its checksum is
        ("hash", "i8"),  # of its flow, 32 bits; -1: see flow_of()
        ("to", "i8"),  # index of a port, or TO_ALL, or TO_NOBODY
        ("vlan", "i8"),  # the VLAN that it is in, 0 none; it does not leave that
        ("tagged", "i8"),  # ... and there is a tag that says so
        ("retag", "i8"),  # 1: somebody wants it the other way; 2: that it is now
        ("until", "i8"),  # ns: when it is given up, while it waits for its receiver
        # Of a switch of several shards:
        ("origin", "i8"),  # number of the one where it came in
        ("source", "i8"),  # address of the PORT that it came by; compared, and no more
        ("epoch", "i8"),  # PORT.epoch of the port that it is to, if it is to one
        ("links", "i8"),  # shards that it is to go on to: a bit each
        ("fragments", "i8"),
        ("fragment", FRAGMENT, (MAX_SLOTS + 1,)),  # one more stands for a tag that was put in
    ],
    align=True,
)
TO_ALL, TO_NOBODY = -1, -2
FRAGMENT_AT: int = PACKET.fields["fragment"][1]  # type: ignore[index]


@inline
def packet_at(pa: int) -> Any:
    """The PACKET at an address."""
    return records(pa, 1, PACKET)[0]


@inline
def fragment_at(pa: int, k: int) -> Any:
    """Fragment k of the PACKET at an address."""
    return records(pa + FRAGMENT_AT + k * 16, 1, FRAGMENT)[0]


@inline
def move_fragment(pa: int, k: int, source: int) -> None:
    """Fragment k is what fragment `source` of the same packet is."""
    here, there = fragment_at(pa, k), fragment_at(pa, source)
    here["gref"], here["offset"], here["length"] = there["gref"], there["offset"], there["length"]
    here["page"] = there["page"]


HEAD = 128
"""Bytes of a packet that are copied to private memory whatever becomes of it: all headers that we look into."""
MOST_HEADROOM = 2048
"""Bytes that a guest may want free before its data, in each page. Linux's netfront wants 256 (XDP_PACKET_HEADROOM)."""
MOST_BYTES = 65536
"""Room for a whole packet."""
HEADROOM = 64
"""Bytes free before a packet's: for what a TAP says of it, and for a tag."""
STRIDE = HEADROOM + MOST_BYTES + HEADROOM
BATCH = 32
"""Packets taken from a ring, or read from a TAP, before they are sent on: WORKER.budget is no more."""

# PORT.kind
PORT_VIF, PORT_OUTER = 1, 2
# PORT.accepts
ACCEPTS_SG, ACCEPTS_CSUM4, ACCEPTS_CSUM6 = 1, 2, 4
ACCEPTS_GSO4, ACCEPTS_GSO6 = 8 << GSO_TCPV4, 8 << GSO_TCPV6
ACCEPTS_ALL = ACCEPTS_SG | ACCEPTS_CSUM4 | ACCEPTS_CSUM6 | ACCEPTS_GSO4 | ACCEPTS_GSO6

MAX_QUEUES = 16
MAX_SHARDS = 16
"""Workers that one switch is spread over."""
MAX_PORTS = 256
MAX_LEARNED = 256
"""Addresses learned behind a port, in each shard: one that floods the table with more pushes out its own."""

MAX_LEARNED_OUTSIDE = 2048
"""... and behind one that leads out of the process, where a whole network may be."""

MOST_GROUPS = 64
"""Multicast addresses that a guest may listen to: XEN_NETBK_MCAST_MAX of Linux's netback."""

GROUPS = np.dtype([("count", "i8"), ("listed", "i8", (MOST_GROUPS,))], align=True)
"""Multicast addresses that a guest listens to, in no order."""

LIMIT = np.dtype(
    [
        ("rate", "f8"),  # bytes a ns; 0: there is no limit
        ("burst", "f8"),  # bytes that are saved up at the most
        ("tokens", "f8"),  # bytes that may be sent now; below 0 is a debt
        ("at", "i8"),  # ns: when that was so
        ("shared", "i8"),  # several workers ask: only who has `holder` may look at what follows, and at `tokens`
        ("holder", "i8"),  # 1 + the queue whose worker has it; 0: nobody has
        ("waiting", "i8"),  # queues that wait for their turn: a bit each
        ("turn", "i8"),  # whose it is
        ("passed", "f8", (MAX_QUEUES,)),  # bytes of each, counted as if who comes anew had had as many as the others
    ],
    align=True,
)

RX_QUEUE = np.dtype(
    [
        ("index", "i8"),
        ("rx", "i8"),  # address of its rx RING
        ("stage", "i8"),  # address of the STAGE of its grefs, 0 if it has none
        ("base", "i8"),  # address of WAIT_BYTES for packets that wait
        ("first", "i8"),  # where the first of them begins
        ("free", "i8"),  # ... and behind the last
        ("wrap", "i8"),  # where the one begins that is not there, as it was put at 0
        ("count", "i8"),
        ("lacking", "i8"),  # buffers that are to be there for the next; 0: it is not for these that it waits
        ("since", "i8"),  # ns: that they have been lacking; 0: they have not
    ],
    align=True,
)
"""RING.priv of both rings of a queue: what waits for its guest, and what of its guest is mapped."""

PORT = np.dtype(
    [
        ("kind", "i8"),  # PORT_*
        ("index", "i8"),  # in its switch, in all shards of it
        ("epoch", "i8"),  # of that index: what was learned of an earlier port there counts no more
        ("home", "i8"),  # number of the shard of its queue 0; of queue q it is that of (home + q) % shards
        ("domid", "i8"),
        ("mac", "i8"),  # its own address, which nobody else may take; 0 none
        ("joined", "i8", (MAX_SHARDS,)),  # the worker of that shard has it in its table
        ("accepts", "i8"),  # ACCEPTS_*
        ("handed_over", "i8"),  # the process ends, and leaves the guest to the next one
        ("learned", "i8", (MAX_SHARDS,)),  # addresses in the table of that shard
        ("hashes", "i8"),  # address of the HASHES that its guest sets, 0 if it cannot
        ("headroom", "i8"),  # bytes that its guest wants free before the data in each page
        ("vlan", "i8"),  # the VLAN of what has no tag here: 1 to 4094; 0: of no VLAN
        ("trunk", "i8"),  # what has a tag is of the VLAN that it says, if that is among
        ("allowed", "u4", (128,)),  # ... these: a bit each
        ("capture", "i8"),  # address of a CAPTURE, 0 if nobody looks
        ("down", "i8"),  # no carrier: nothing comes and nothing goes
        ("most", "i8"),  # bytes of a packet, or of a segment, without tags that is not too large, 0: any is not
        ("notifies", "i8"),  # the guest says of buffers when it posts them (feature-rx-notify)
        ("drain_ns", "i8"),  # how long a packet waits for them
        ("stall_ns", "i8"),  # how long the guest may have too few; 0: for ever
        ("stalled", "i8"),  # RINGs on which it had
        ("filters", "i8"),  # of what is sent to groups it gets what it listens to
        ("amending", "i8"),  # a worker changes the groups, and no other may
        ("groups", "i8"),  # address of the GROUPS
        ("from_guest", "i8"),  # address of the LIMIT of what it sends, and
        ("to_guest", "i8"),  # ... of what is sent to it
        ("n_out", "i8"),  # RINGs that packets to it go to; 0: to none, as when it leaves
        ("out", "i8", (MAX_QUEUES,)),  # their addresses
    ],
    align=True,
)

VLAN_SHIFT = 48
"""An address in a VLAN, as the table has it: the VLAN above the six bytes."""
CAPTURE_AT: int = PORT.fields["capture"][1]  # type: ignore[index]
HEADROOM_AT: int = PORT.fields["headroom"][1]  # type: ignore[index]
STALLED_AT: int = PORT.fields["stalled"][1]  # type: ignore[index]
AMENDING_AT: int = PORT.fields["amending"][1]  # type: ignore[index]
HOLDER_AT: int = LIMIT.fields["holder"][1]  # type: ignore[index]

TABLE_BITS = 12
TABLE_PROBES = 8
TABLE_ENTRY = np.dtype(
    [
        ("version", "i8"),  # odd while it is being changed: for who reads the table of another shard
        ("mac", "i8"),
        ("port", "i8"),
        ("epoch", "i8"),  # PORT.epoch; 0: the entry is free
        ("seen", "i8"),  # ns
        ("stamp", "i8"),  # COMMON.moves when it was found here last: of two shards' entries the later one counts
        ("fixed", "i8"),  # the port's own address
    ],
    align=True,
)

SWITCH = np.dtype(
    [
        ("ports", "i8", (MAX_PORTS,)),  # addresses of PORTs, 0 none; written by the control side
        ("shard", "i8"),  # its number,
        ("shards", "i8"),  # ... of so many
        ("common", "i8"),  # address of the COMMON of them all
        ("peers", "i8", (MAX_SHARDS,)),  # addresses of all their SWITCHes
        ("links", "i8", (MAX_SHARDS,)),  # of the LINKs to the others, 0 to itself
        ("joins", "i8"),  # COMMON.joins when it looked for new ports
        ("top", "i8"),  # no index from this on was ever used
        ("vlans", "i8"),  # a port is, or was, of a VLAN: somebody has to look
        ("wire", "i8"),  # two ports, and what comes by one leaves by the other: nothing is learned
        ("table", "i8"),  # address of TABLE_ENTRY[1 << TABLE_BITS]
        ("slots", "i8"),  # a ring's worth of TX_REQUESTs: private copies
        ("packets", "i8"),  # PACKET[BATCH]
        ("data", "i8"),  # STRIDE bytes for each of them, of which HEADROOM stay free
        ("deliveries", "i8"),  # DELIVERY[MAX_DELIVERIES]
        ("n_deliveries", "i8"),
        ("n_ops", "i8"),  # copies in the worker's batch
        ("last_src", "i8"),  # of this pass: what was learned last, -1 nothing,
        ("last_dst", "i8"),  # ... and found last, -1 nothing,
        ("last_to", "i8"),  # ... where that is
        ("page", "i8"),  # the receiver's page that is being filled: its gref,
        ("page_at", "i8"),  # ... from where on it is empty,
        ("page_in", "i8"),  # ... and its address, if it is mapped, or 0
        ("scratch", "i8"),  # 64 bytes
        ("pieces", "i8"),  # IOVEC[MOST_PIECES]: of the packet that is being written to a descriptor
        ("parcel", "i8"),  # PACKET: the segment that is being sent, of one that is cut
        ("cuts", "i8"),  # CUT_BYTES for segments that are on their way
        ("cut_at", "i8"),  # ... from here on they are free
    ],
    align=True,
)

"""A shard: what one worker has of a switch. With one worker that is all of it."""

COMMON = np.dtype(
    [
        ("moves", "i8"),  # addresses that were learned anew, by any shard
        ("pad", "i8", (7,)),
        ("joins", "i8"),  # ports that have joined; the control side's
        ("pad2", "i8", (7,)),
    ],
    align=True,
)
"""What the shards of a switch have in common: two cache lines, both rarely written."""
JOINS_AT: int = COMMON.fields["joins"][1]  # type: ignore[index]

MOST_PIECES = MAX_SLOTS + 2
CUT_BYTES = 4 * MOST_BYTES
MAX_DELIVERIES = 1024
DELIVERY = np.dtype([("ring", "i8"), ("first", "i8"), ("slots", "i8"), ("packet", "i8"), ("kept", "i8")], align=True)
"""A packet on its way into slots `first` on of a receiver's ring: who is to be told if a copy fails. Or to where it
waits for that, if `kept` is not 0: then that PACKET is told, and the sender."""
_DELIVERY_SIZE = DELIVERY.itemsize

# Index into STATS.kinds.
(N_SENT, N_RECEIVED, N_REFUSED, N_DROPPED, N_FAILED, N_NOBODY, N_SPOOFED, N_UNSUPPORTED, N_CUT,
 N_EXPIRED, N_FILTERED, N_TOO_LARGE, N_DOWN, N_LINK) = range(14)  # fmt: skip
KIND_NAMES = (
    "sent", "received", "refused", "dropped", "failed", "to nobody", "spoofed", "not accepted", "cut",
    "expired", "filtered", "too large", "no carrier", "link full",
)  # fmt: skip
"""By the guest; to it; broken requests; no room on its ring; a page that could not be had; and of what it sent: nobody
is there; under an address of somebody else; not sent on, as the receiver takes nothing of the kind. To it, and cut into
its segments here; dropped, as it had no buffers for too long; to a group that it does not listen to. By it or to it,
and larger than its MTU; while it has no carrier. By it, and lost on its way to another worker of its switch."""


@inline
def port_at(at: int) -> Any:
    """The PORT at an address."""
    return records(at, 1, PORT)[0]


@inline
def switch_at(at: int) -> Any:
    """The SWITCH at an address."""
    return records(at, 1, SWITCH)[0]


@inline
def delivery_at(swa: int, k: int) -> Any:
    """DELIVERY k of the switch at an address."""
    return records(switch_at(swa)["deliveries"] + k * _DELIVERY_SIZE, 1, DELIVERY)[0]


assert FRAGMENT.itemsize == 16
