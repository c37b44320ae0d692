"""The hypercalls of the embedded Xen as they travel over DIR/hypervisor, a unix SOCK_SEQPACKET socket.

A request is u32 op and u32 arg[7], then at most 256 bytes of tail; the answer is s32 status (0 or -errno) and
u32 value[7], a tail, and file descriptors by SCM_RIGHTS. All little endian. docs/joining.md is the specification.
"""

from __future__ import annotations

import struct
from typing import Final

VERSION: Final = 1

REQUEST: Final = struct.Struct("<8I")
REPLY: Final = struct.Struct("<i7I")
LARGEST_REQUEST: Final = REQUEST.size + 256
LARGEST_REPLY: Final = REPLY.size + 4096
MOST_FDS: Final = 4

SOCKET: Final = "hypervisor"
STORE: Final = "xenstored"
LOCK: Final = "sim.lock"

# op: arguments -> values; "fds" are descriptors in this order
HELLO: Final = 1  # version, domid, flags, port limit; tail: token -> handle, pages, grant entries, limit; fds
CREATE_DOMAIN: Final = 2  # pages, grant entries (0: default) -> domid; tail: token (16), uuid (36)
DESTROY_DOMAIN: Final = 3  # domid
LIST_DOMAINS: Final = 4  # first domid -> count; tail: DOMAIN_RECORD each, in order
DOMAIN_INFO: Final = 5  # domid -> pages, grant entries, DOMAIN_* flags; tail: uuid (36)
FOREIGN: Final = 6  # domid -> pages, grant entries; fds: memory, grant table, active table
CLAIM_FRAMES: Final = 7  # count -> first frame of an extent that this handle may use
CLAIM_GREFS: Final = 8  # count -> first gref of an extent that this handle may use
EVTCHN_ALLOC_UNBOUND: Final = 16  # remote domid -> port
EVTCHN_BIND_INTERDOMAIN: Final = 17  # remote domid, remote port -> port
EVTCHN_CLOSE: Final = 18  # port
EVTCHN_STATUS: Final = 19  # domid, port -> EVTCHNSTAT_*, remote domid, remote port
EVTCHN_FDS: Final = 20  # port -> ; fds: eventfd to notify with, eventfd to wait on

# HELLO flags
WANT_MEMORY: Final = 1  # fds: memory, grant table
WANT_STORE: Final = 2  # fd (after those): a connection to xenstore as this domain

DOMAIN_RECORD: Final = struct.Struct("<4I36s4x")
"""One domain of LIST_DOMAINS: domid, flags, pages, handles, uuid; 56 bytes."""
DOMAIN_DYING: Final = 1

DOMID_FIRST_RESERVED: Final = 0x7FF0  # xen.h
DOMID_SELF: Final = 0x7FF0  # xen.h

EVTCHNSTAT_closed: Final = 0  # event_channel.h
EVTCHNSTAT_unbound: Final = 1
EVTCHNSTAT_interdomain: Final = 2

PORTS_2L: Final = 4096  # event_channel.h, EVTCHN_2L_NR_CHANNELS on a 64-bit machine
PORTS_FIFO: Final = 131072  # event_channel.h, EVTCHN_FIFO_NR_CHANNELS

PAGE: Final = 4096
RESERVED_GREFS: Final = 8  # grant_table.h, GNTTAB_NR_RESERVED_ENTRIES
DEFAULT_GRANTS: Final = 32768  # 64 frames of 512 entries: Xen's gnttab_max_frames
MOST_GRANTS: Final = 1 << 20
DEFAULT_PAGES: Final = 64 * 256  # 64 MiB
DOM0_PAGES: Final = 1024 * 256  # 1 GiB of address space; a page takes room when it is touched

# A word of the active table, one u64 for each gref, in memory that the granting domain cannot reach.
# readers, writers: how often it is mapped. A gref belongs to one handle at a time.
ACTIVE_WRITER_SHIFT: Final = 16
ACTIVE_COUNTS: Final = 0xFFFF_FFFF
ACTIVE_OWNER_SHIFT: Final = 32
ACTIVE_BUSY: Final = 1 << 62
MOST_HANDLES: Final = (1 << 30) - 1
