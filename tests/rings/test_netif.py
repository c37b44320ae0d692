"""The wire of netif: layouts, constants and the Toeplitz hash against Debian's header, answers against naive twins."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rings import netif
from rings.jit import kernel
from rings.ring import PAGE_SIZE, ring_entries
from tests.rings.guard import Guarded, guarded
from tests.rings.headers import (
    PRELUDE,
    Require,
    compare_constants,
    compare_layouts,
    constant_lines,
    layout_lines,
    seen_by_c,
    toeplitz_by_c,
)
from tests.rings.naive_toeplitz import toeplitz as naive_toeplitz

STRUCTS = {
    "netif_tx_request": netif.TX_REQUEST,
    "netif_tx_response": netif.TX_RESPONSE,
    "netif_rx_request": netif.RX_REQUEST,
    "netif_rx_response": netif.RX_RESPONSE,
    "xen_netif_ctrl_request": netif.CTRL_REQUEST,
    "xen_netif_ctrl_response": netif.CTRL_RESPONSE,
    "xen_netif_gref": netif.GREF,
}
EXTRAS = {  # our field -> the header's, in the union
    "gso": (netif.GSO, {"size": "size", "gso_type": "type", "pad": "pad", "features": "features"}),
    "mcast": (netif.MCAST, {"addr": "addr"}),
    "hash": (netif.HASH, {"hash_type": "type", "algorithm": "algorithm", "value": "value"}),
}
SLOTS = {"netif_tx": netif.TX_ENTRY_SIZE, "netif_rx": netif.RX_ENTRY_SIZE, "xen_netif_ctrl": netif.CTRL_ENTRY_SIZE}
CONSTANTS = {
    "XEN_NETIF_NR_SLOTS_MIN": netif.NR_SLOTS_MIN,
    "XEN_NETIF_MAX_TX_SIZE": netif.MAX_TX_SIZE,
    **{f"NETTXF_{name}": getattr(netif, f"TXF_{name}")
       for name in ("csum_blank", "data_validated", "more_data", "extra_info")},
    **{f"NETRXF_{name}": getattr(netif, f"RXF_{name}")
       for name in ("csum_blank", "data_validated", "more_data", "extra_info", "gso_prefix")},
    **{f"NETIF_RSP_{name}": getattr(netif, f"RSP_{name}") for name in ("OKAY", "ERROR", "DROPPED", "NULL")},
    **{f"XEN_NETIF_EXTRA_TYPE_{name}": getattr(netif, f"EXTRA_{name}")
       for name in ("NONE", "GSO", "MCAST_ADD", "MCAST_DEL", "HASH")},
    "XEN_NETIF_EXTRA_FLAG_MORE": netif.EXTRA_FLAG_MORE,
    **{f"XEN_NETIF_GSO_TYPE_{name}": getattr(netif, f"GSO_{name}") for name in ("NONE", "TCPV4", "TCPV6")},
    **{f"XEN_NETIF_CTRL_HASH_TYPE_{name}": getattr(netif, f"HASH_{name}")
       for name in ("IPV4", "IPV4_TCP", "IPV6", "IPV6_TCP")},
    **{f"XEN_NETIF_CTRL_HASH_ALGORITHM_{name}": getattr(netif, f"HASH_ALGORITHM_{name}")
       for name in ("NONE", "TOEPLITZ")},
    **{f"XEN_NETIF_CTRL_TYPE_{name}": getattr(netif, f"CTRL_{name}")
       for name in ("INVALID", "GET_HASH_FLAGS", "SET_HASH_FLAGS", "SET_HASH_KEY", "GET_HASH_MAPPING_SIZE",
                    "SET_HASH_MAPPING_SIZE", "SET_HASH_MAPPING", "SET_HASH_ALGORITHM", "GET_GREF_MAPPING_SIZE",
                    "ADD_GREF_MAPPING", "DEL_GREF_MAPPING")},
    **{f"XEN_NETIF_CTRL_STATUS_{name}": getattr(netif, f"CTRL_{name}")
       for name in ("SUCCESS", "NOT_SUPPORTED", "INVALID_PARAMETER", "BUFFER_OVERFLOW")},
    "XEN_NETIF_CTRLF_GREF_readonly": netif.GREF_readonly,
}  # fmt: skip


def test_layout_is_that_of_the_header(tmp_path: Path, require_program: Require, require_package: Require) -> None:
    gcc = require_program("gcc", "gcc")
    require_package("/usr/include/xen/io/netif.h", "libxen-dev")
    lines = [*PRELUDE, "#include <xen/io/ring.h>", "#include <xen/io/netif.h>"]
    lines += ["int main(void) {", *layout_lines(STRUCTS), *constant_lines(list(CONSTANTS))]
    for member, (_, names) in EXTRAS.items():
        for ours, theirs in {"type": "type", "flags": "flags", **names}.items():
            where = theirs if ours in ("type", "flags") else f"u.{member}.{theirs}"
            size = f"sizeof(((struct netif_extra_info *)0)->{where})"
            lines.append(f'printf("{member} {ours} %zu %zu\\n", offsetof(struct netif_extra_info, {where}), {size});')
    lines.append('printf("extra . 0 %zu\\n", sizeof(struct netif_extra_info));')
    for ring in SLOTS:
        size = f"(unsigned)__CONST_RING_SIZE({ring}, 4096)"
        lines.append(f'printf("{ring} slots %zu %u\\n", sizeof(union {ring}_sring_entry), {size});')
    seen = seen_by_c(lines, tmp_path, gcc)
    compare_layouts(seen, STRUCTS)
    compare_constants(seen, CONSTANTS)
    for member, (dtype, _) in EXTRAS.items():
        assert dtype.itemsize == netif.EXTRA_SIZE
        for field, (format, at, *_) in (dtype.fields or {}).items():
            assert seen.pop((member, field)) == (at, format.itemsize), (member, field)
    assert seen.pop(("extra", "."))[1] == netif.EXTRA_SIZE
    for ring, size in SLOTS.items():
        assert seen.pop((ring, "slots")) == (size, ring_entries(PAGE_SIZE, size)), ring
    assert seen == {}
    assert netif.XDP.itemsize == netif.EXTRA_SIZE


@kernel
def answer_tx(slot: int, id: int, status: int) -> None:
    netif.put_tx_response(slot, id, status)


@kernel
def answer_rx(slot: int, id: int, offset: int, flags: int, status: int) -> None:
    netif.put_rx_response(slot, id, offset, flags, status)


@given(st.integers(0, 0xFFFF), st.sampled_from([netif.RSP_OKAY, netif.RSP_ERROR, netif.RSP_DROPPED, netif.RSP_NULL]))
def test_a_tx_response_is_four_bytes(id: int, status: int) -> None:
    slot = Guarded(4)
    answer_tx(slot.address, id, status)
    slot.check()
    assert slot.bytes.tobytes() == struct.pack("<Hh", id, status)


@given(st.integers(0, 0xFFFF), st.integers(0, 4095), st.integers(0, 31), st.integers(-2, 4096))
def test_an_rx_response_is_eight_bytes(id: int, offset: int, flags: int, status: int) -> None:
    slot = Guarded(8)
    answer_rx(slot.address, id, offset, flags, status)
    slot.check()
    assert slot.bytes.tobytes() == struct.pack("<HHHh", id, offset, flags, status)


@given(st.binary(max_size=40), st.binary(max_size=36))
def test_toeplitz(key: bytes, data: bytes) -> None:
    where, what = guarded(key or b"\0"), guarded(data or b"\0")
    assert netif.toeplitz(where.address, len(key), what.address, len(data)) == naive_toeplitz(key, data)


def test_toeplitz_is_that_of_the_header(tmp_path: Path, require_program: Require, require_package: Require) -> None:
    """The reference code in netif.h, on the key and some of the flows that Microsoft publishes for RSS."""
    gcc = require_program("gcc", "gcc")
    require_package("/usr/include/xen/io/netif.h", "libxen-dev")
    rng = np.random.default_rng(1)
    cases = [(k, d, rng.bytes(40), rng.bytes(36)) for k in (0, 1, 7, 8, 16, 39, 40) for d in (0, 1, 8, 12, 32, 36)]
    values = toeplitz_by_c([(key[:k], data[:d]) for k, d, key, data in cases], tmp_path, gcc)
    for (k, d, key, data), value in zip(cases, values):
        where, what = guarded(key), guarded(data)
        assert netif.toeplitz(where.address, k, what.address, d) == value, (k, d)


def test_the_published_vectors_of_rss() -> None:
    """Of Microsoft: "Verifying the RSS hash calculation", 66.9.149.187:2794 to
    161.142.100.80:1766, without ports and with."""
    key = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
    flow = bytes([66, 9, 149, 187, 161, 142, 100, 80]) + struct.pack(">HH", 2794, 1766)
    where, what = guarded(key), guarded(flow)
    assert netif.toeplitz(where.address, 40, what.address, 8) == 0x323E8FC2
    assert netif.toeplitz(where.address, 40, what.address, 12) == 0x51CCC178
