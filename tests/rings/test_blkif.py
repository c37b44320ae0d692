"""The wire of blkif: layouts against Debian's headers, conversion between the ABIs, names and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rings import blkif
from rings.jit import kernel
from rings.ring import HEADER_SIZE, PAGE_SIZE, ring_entries
from tests.rings import naive
from tests.rings.guard import Guarded, guarded
from tests.rings.headers import (
    INDICES,
    PRELUDE,
    Require,
    compare_constants,
    compare_layouts,
    constant_lines,
    layout_lines,
    seen_by_c,
)

STRUCTS = {
    64: {
        "blkif_request": blkif.REQUEST_64,
        "blkif_request_segment": blkif.SEGMENT,
        "blkif_request_discard": blkif.DISCARD_64,
        "blkif_request_indirect": blkif.INDIRECT_64,
        "blkif_response": blkif.RESPONSE_64,
    },
    32: {
        "blkif_request": blkif.REQUEST_32,
        "blkif_request_segment": blkif.SEGMENT,
        "blkif_request_discard": blkif.DISCARD_32,
        "blkif_request_indirect": blkif.INDIRECT_32,
        "blkif_response": blkif.RESPONSE_32,
    },
}


def c_program(abi: int) -> list[str]:
    """Prints size, and offset and size of each field, as gcc sees the headers of Debian's libxen-dev."""
    lines = [*PRELUDE]
    if abi == 32:
        # What i386 does, without a compiler for i386: uint64_t aligned to 4, and the padding that is there
        # only.
        lines += ["#define __i386__ 1", "#pragma pack(push, 4)"]
    lines += [f"#include <xen/io/{name}.h>" for name in ("ring", "blkif", "protocols")]
    lines += ["int main(void) {", *layout_lines(STRUCTS[abi])]
    entry = "sizeof(union blkif_sring_entry)"
    lines.append(f'printf("sring ring %zu %zu\\n", offsetof(blkif_sring_t, ring), {entry});')
    for field in INDICES:
        lines.append(f'printf("sring {field} %zu 4\\n", offsetof(blkif_sring_t, {field}));')
    for order in range(5):
        size = f"(unsigned)__CONST_RING_SIZE(blkif, 4096 << {order})"
        lines.append(f'printf("entries {order} 0 %u\\n", {size});')
    lines += constant_lines(list(CONSTANTS))
    for name, value in PROTOCOLS.items():
        lines.append(f'printf("protocol {value} 0 %d\\n", !strcmp({name}, "{value}"));')
    return lines


CONSTANTS = {
    "BLKIF_OP_READ": blkif.OP_READ,
    "BLKIF_OP_WRITE": blkif.OP_WRITE,
    "BLKIF_OP_WRITE_BARRIER": blkif.OP_WRITE_BARRIER,
    "BLKIF_OP_FLUSH_DISKCACHE": blkif.OP_FLUSH_DISKCACHE,
    "BLKIF_OP_RESERVED_1": blkif.OP_RESERVED_1,
    "BLKIF_OP_DISCARD": blkif.OP_DISCARD,
    "BLKIF_OP_INDIRECT": blkif.OP_INDIRECT,
    "BLKIF_RSP_OKAY": blkif.RSP_OKAY,
    "BLKIF_RSP_ERROR": blkif.RSP_ERROR,
    "BLKIF_RSP_EOPNOTSUPP": blkif.RSP_EOPNOTSUPP,
    "BLKIF_DISCARD_SECURE": blkif.DISCARD_SECURE,
    "BLKIF_MAX_SEGMENTS_PER_REQUEST": blkif.MAX_SEGMENTS,
    "BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST": blkif.MAX_INDIRECT_PAGES,
    "VDISK_CDROM": blkif.VDISK_CDROM,
    "VDISK_REMOVABLE": blkif.VDISK_REMOVABLE,
    "VDISK_READONLY": blkif.VDISK_READONLY,
}
PROTOCOLS = {
    "XEN_IO_PROTO_ABI_X86_32": blkif.PROTOCOL_X86_32,
    "XEN_IO_PROTO_ABI_X86_64": blkif.PROTOCOL_X86_64,
    "XEN_IO_PROTO_ABI_ARM": blkif.PROTOCOL_ARM,
}


@pytest.mark.parametrize("abi", [64, 32])
def test_layout_is_that_of_the_headers(
    abi: int,
    tmp_path: Path,
    require_program: Require,
    require_package: Require,
) -> None:
    gcc = require_program("gcc", "gcc")
    require_package("/usr/include/xen/io/blkif.h", "libxen-dev")
    seen = seen_by_c(c_program(abi), tmp_path, gcc)
    compare_layouts(seen, STRUCTS[abi])
    assert seen.pop(("sring", "ring")) == (HEADER_SIZE, blkif.ENTRY_SIZE[abi])
    assert [seen.pop(("sring", field))[0] for field in INDICES] == [0, 4, 8, 12]
    for order in range(blkif.MAX_RING_PAGE_ORDER + 1):
        want = ring_entries(PAGE_SIZE << order, blkif.ENTRY_SIZE[abi])
        assert seen.pop(("entries", str(order)))[1] == want == 32 << order
    compare_constants(seen, CONSTANTS)
    for value in PROTOCOLS.values():
        assert seen.pop(("protocol", value))[1] == 1, value
    assert seen == {}


@kernel
def convert(dst: int, src: int) -> None:
    blkif.to_native(dst, src)


@kernel
def convert_back(dst: int, src: int) -> None:
    blkif.from_native(dst, src)


def claimed(dtype: np.dtype[Any], data: bytes) -> list[Any]:
    """The values of all fields, padding left out."""
    record = np.frombuffer(data.ljust(dtype.itemsize, b"\0")[: dtype.itemsize], dtype)[0]
    return [record[name].tolist() for name in dtype.names or () if name != "pad"]


@given(st.binary(min_size=108, max_size=108), st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 255, None]))
def test_to_native_takes_any_bytes(data: bytes, op: int | None) -> None:
    data = data if op is None else bytes([op]) + data[1:]
    source, target = guarded(data), Guarded(112).fill(b"\xff" * 112)
    convert(target.address, source.address)
    target.check()
    got = target.bytes.tobytes()
    kind = {5: blkif.DISCARD, 6: blkif.INDIRECT}.get(data[0], blkif.REQUEST)
    assert claimed(kind[64], got) == claimed(kind[64], naive.request_32_to_64(data))
    assert claimed(kind[64], got) == claimed(kind[32], data)
    assert got[4:8] == bytes(4), "what nobody sent is zero, not ours"
    back = Guarded(108)
    convert_back(back.address, target.address)
    back.check()
    assert back.bytes.tobytes() == data


@kernel
def respond(slot: int, abi: int, id: int, operation: int, status: int) -> None:
    blkif.put_response(slot, abi, id, operation, status)


@given(st.sampled_from([32, 64]), st.integers(0, 2**64 - 1), st.integers(0, 255), st.integers(-2, 0))
def test_a_response_is_whole_and_nothing_more(abi: int, id: int, operation: int, status: int) -> None:
    want = naive.response(abi, id, operation, status)
    slot = Guarded(len(want))
    for same in (np.uint64(id), np.int64(id - 2**64 if id >= 2**63 else id)):
        slot.fill(b"\xee" * len(want))
        respond(slot.address, abi, same, operation, status)
        slot.check()
        assert slot.bytes.tobytes() == want


def test_the_default_abi_on_x86_is_the_32_bit_one() -> None:
    assert blkif.abi_of(None, "x86_64") == blkif.ABI_32
    assert blkif.abi_of(None, "aarch64") == blkif.ABI_64
    assert blkif.abi_of("x86_32-abi") == blkif.ABI_32
    assert blkif.abi_of("x86_64-abi") == blkif.abi_of("arm-abi") == blkif.ABI_64
    with pytest.raises(ValueError, match="'sparc' is not one of x86_32-abi"):
        blkif.abi_of("sparc")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("xvda", 51712),
        ("xvdb", 51728),
        ("xvda1", 51713),
        ("xvdp15", 51967),
        ("xvdq", 1 << 28 | 16 << 8),
        ("xvda16", 1 << 28 | 16),
        ("xvdaa", 1 << 28 | 26 << 8),
        ("xvdaz3", 1 << 28 | 51 << 8 | 3),
        ("sda", 2048),
        ("sdb2", 2066),
        ("hda", 768),
        ("hdb1", 833),
        ("hdc", 5632),
        ("hdd63", 5632 + 64 + 63),
    ],
)
def test_vdev(name: str, number: int) -> None:
    assert blkif.vdev_number(name) == number
    assert blkif.vdev_name(number) == name


def test_vdev_of_numbers_and_of_disk_and_partition() -> None:
    assert blkif.vdev_number("d0") == blkif.vdev_number("51712") == blkif.vdev_number("0xca00") == 51712
    assert blkif.vdev_number("d1p2") == 51730
    assert blkif.vdev_number("d100p3") == 1 << 28 | 100 << 8 | 3
    assert blkif.vdev_name(0x7F00) == "32512"


@pytest.mark.parametrize(
    "name", ["", "xvd", "xvdA", "sdq", "sda16", "hde", "hda64", "xvda256", "vda", "d", "-1", "1e9"]
)
def test_vdev_refuses(name: str) -> None:
    with pytest.raises(ValueError, match="virtual device"):
        blkif.vdev_number(name)


@given(st.integers(0, (1 << 20) - 1), st.integers(0, 255))
def test_vdev_there_and_back(disk: int, part: int) -> None:
    number = blkif.vdev_number(f"d{disk}p{part}")
    assert blkif.vdev_number(blkif.vdev_name(number)) == number
