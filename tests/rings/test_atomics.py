"""Each primitive, with and without the JIT: what it returns, and which bytes it leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rings import atomics
from rings.atomics import (
    compare_exchange16,
    compare_exchange32,
    compare_exchange64,
    copy_bytes,
    copy_in,
    distance,
    exchange32,
    exchange64,
    fetch_add32,
    fetch_add64,
    fetch_and16,
    fetch_and32,
    fetch_and64,
    fetch_or32,
    fetch_or64,
    load8,
    load16,
    load32,
    load64,
    load_acquire16,
    load_acquire32,
    load_acquire64,
    load_once16,
    load_once32,
    load_once64,
    records,
    signed_distance,
    store8,
    store16,
    store32,
    store64,
    store_once16,
    store_once32,
    store_once64,
    store_release16,
    store_release32,
    store_release64,
    zero_bytes,
)
from rings.jit import SEAM, address_of, kernel, seam_function
from tests.rings.guard import Guarded, guarded

U64 = st.integers(0, 2**64 - 1)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@kernel
def all_loads(a: int) -> Any:
    return (
        load8(a), load16(a), load_once16(a), load_acquire16(a), load32(a), load_once32(a), load_acquire32(a),
        load64(a), load_once64(a), load_acquire64(a),
    )  # fmt: skip


@given(U64)
def test_loads(value: int) -> None:
    memory = guarded(value.to_bytes(8, "little"))
    one, two, four, eight = value & 0xFF, value & 0xFFFF, value & 0xFFFFFFFF, signed(value)
    assert all_loads(memory.address) == (one, two, two, two, four, four, four, eight, eight, eight)


def store_kernel(store: Any) -> Any:
    @kernel
    def run(address: int, value: int) -> None:
        store(address, value)

    return run


STORES = {
    8: [store8],
    16: [store16, store_once16, store_release16],
    32: [store32, store_once32, store_release32],
    64: [store64, store_once64, store_release64],
}
STORE_KERNELS = [(bits, store_kernel(store)) for bits, stores in STORES.items() for store in stores]


@given(st.integers(-(2**63), 2**63 - 1))
def test_stores_cut_off_and_stay_inside(value: int) -> None:
    for bits, store in STORE_KERNELS:
        memory = Guarded(bits // 8)
        store(memory.address, value)
        memory.check()
        assert memory.bytes.tobytes() == (value % 2**bits).to_bytes(bits // 8, "little")


@kernel
def exchanges(a: int, old: int, new: int) -> Any:
    return compare_exchange16(a, old, new), compare_exchange32(a + 8, old, new), compare_exchange64(a + 16, old, new)


@pytest.mark.parametrize("differs", [False, True])
def test_compare_exchange(differs: bool) -> None:
    memory = Guarded(24)
    words = memory.bytes.view(np.uint64)
    words[:] = 7
    assert exchanges(memory.address, 8 if differs else 7, 9) == (7, 7, 7)
    assert words.tolist() == ([7] * 3 if differs else [9] * 3)


@kernel
def modifies(a: int, v: int) -> Any:
    return (
        exchange32(a, v), exchange64(a + 8, v), fetch_add32(a + 16, v), fetch_add64(a + 24, v),
        fetch_or32(a + 32, v), fetch_or64(a + 40, v), fetch_and16(a + 48, v), fetch_and32(a + 56, v),
        fetch_and64(a + 64, v),
    )  # fmt: skip


@given(U64, st.integers(-(2**63), 2**63 - 1))
def test_read_modify_write(before: int, v: int) -> None:
    memory = Guarded(72)
    words = memory.bytes.view(np.uint64)
    words[:] = before
    four, eight = before & 0xFFFFFFFF, signed(before)
    assert modifies(memory.address, v) == (four, eight, four, eight, four, eight, before & 0xFFFF, four, eight)

    def changed(bits: int, value: int) -> int:
        low = (1 << bits) - 1
        return before & ~low | value & low

    assert words.tolist() == [
        changed(32, v),
        changed(64, v),
        changed(32, before + v),
        changed(64, before + v),
        changed(32, before | v),
        changed(64, before | v),
        changed(16, before & v),
        changed(32, before & v),
        changed(64, before & v),
    ]


@given(st.binary(max_size=200))
def test_copies_and_zeroes_stay_inside(data: bytes) -> None:
    source = guarded(data)
    for copy in (copy_bytes, copy_in):
        target = Guarded(len(data))
        copy(target.address, source.address, len(data))
        target.check()
        assert target.bytes.tobytes() == data
    zero_bytes(target.address, len(data))
    target.check()
    assert not target.bytes.any()


@given(st.integers(0, 2**32 - 1), st.integers(-(2**31), 2**31 - 1))
def test_distances(a: int, ahead: int) -> None:
    b = (a + ahead) % 2**32
    assert distance(b, a) == ahead % 2**32
    assert signed_distance(b, a) == ahead


DT = np.dtype([("a", "u1"), ("b", "<u4", (2,))])


@kernel
def add_up(address: int, n: int) -> int:
    total = 0
    for i in range(n):
        r = records(address + i * 9, 1, DT)[0]
        total += r["a"] + r["b"][0] + r["b"][1]
        r["a"] = 0
    return total


def test_records_are_views() -> None:
    array = np.array([(1, (2, 3)), (4, (5, 6))], DT)
    assert add_up(array.ctypes.data, 2) == 21
    assert array["a"].tolist() == [0, 0]


def _minus(context: int, a: int, b: int, c: int) -> int:
    return context - a * 100 - b * 10 - c


minus = seam_function(_minus)


@kernel
def through(address: int, context: int) -> int:
    return atomics.call(address, context, 1, 2, 3)


def test_call_by_address() -> None:
    assert through(address_of(minus), 1000) == 877
    assert SEAM is not None


@kernel
def barriers() -> int:
    before = atomics.cycles()
    atomics.full_barrier()
    atomics.compiler_barrier()
    atomics.pause()
    return atomics.cycles() - before


def test_barriers_can_be_called_and_time_goes_on() -> None:
    assert barriers() > 0
