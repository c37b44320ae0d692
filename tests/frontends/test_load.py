"""The load generator: that it does what the plan says, and that it notices what a verifier is there for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdrivers.errors import ConfigError
from pvdrivers.frontends import load_kernels
from pvdrivers.frontends.load import Ledger, Load, Plan
from rings import blkif
from tests.frontends import naive


@given(
    sector=st.integers(0, 1 << 54),
    generation=st.integers(1, 1 << 40),
    salt=st.integers(0, (1 << 31) - 1),
    sectors=st.integers(1, 9),
    whole=st.booleans(),
    flip=st.integers(0, 9 * 4096),
)
def test_stamps_are_those_of_the_twin(
    sector: int, generation: int, salt: int, sectors: int, whole: bool, flip: int
) -> None:
    data = bytearray(512 * sectors)
    import numpy as np

    at = int(np.frombuffer(data, np.uint8).ctypes.data)
    load_kernels.stamp(at, sectors, sector, generation, salt, whole)
    assert data == naive.stamp(sectors, sector, generation, salt, whole)
    assert load_kernels.first_bad(at, sectors, sector, generation, salt, whole) == -1
    flip %= len(data) * 8
    data[flip // 8] ^= 1 << flip % 8
    bad = load_kernels.first_bad(at, sectors, sector, generation, salt, whole)
    assert bad == naive.first_bad(data, sector, generation, salt, whole)


@pytest.mark.parametrize("verify", ["off", "stamps", "all"])
@pytest.mark.parametrize("block_size", [512, 4096, 40960])
def test_a_mixed_load_is_right(setup: Any, verify: str, block_size: int) -> None:
    setup.serve(2 << 20)
    disk = setup.connect(queues=2, ring_order=1)
    plan = Plan(block_size=block_size, depth=8, write_percent=60, verify=verify, requests=600, again_percent=50)
    result = Load(disk, plan).run(30)
    assert result.right
    assert result.requests == 600
    assert result.nbytes == 600 * block_size
    assert (result.verified > 0) == (verify != "off")
    assert result.latency_us(0.5) > 0
    assert result.notify_sent > 0


def test_registered_buffers_are_granted_once(setup: Any) -> None:
    """Right all the same, no grant for any request; and the grants end with the buffers."""
    setup.serve(1 << 20)
    disk = setup.connect(persistent=False)
    before = disk.stats()["granted_pages"]
    plan = Plan(depth=8, write_percent=50, verify="all", requests=600, registered=True)
    assert Load(disk, plan).run(30).right
    assert disk.stats()["granted_pages"] == before
    buffer = disk.buffer(8192)
    buffer.register(disk.backend_domid)
    grefs = [-int(frame) for frame in buffer.frames]
    assert all(gref > 0 for gref in grefs)
    buffer.free()
    again = disk.buffer(8192)
    again.register(disk.backend_domid)  # the grefs were given back
    assert sorted(-int(frame) for frame in again.frames) == sorted(grefs)
    again.free()


def test_filled_and_checked(setup: Any) -> None:
    """Every block once in order, then every block read; the backend's bytes are what the twin says."""
    backend = setup.serve(1 << 20)
    disk = setup.connect(queues=2)
    ledger = Ledger(disk.info.size, 4096)
    fill = Plan(write_percent=100, random=False, verify="all", requests=ledger.blocks, again_percent=0)
    assert Load(disk, fill, ledger).run(30).right
    assert set(ledger.generations) == {1}
    check = Plan(write_percent=0, random=False, verify="all", requests=ledger.blocks)
    result = Load(disk, check, ledger).run(30)
    assert (result.verified, result.mismatches) == (ledger.blocks, 0)
    for block in range(ledger.blocks):
        expected = naive.stamp(8, block * 8, 1, ledger.salt, True)
        assert backend.data[block * 4096 : (block + 1) * 4096] == expected
    assert ledger.check(0, bytes(backend.data))
    backend.data[5000] ^= 1
    assert not ledger.check(0, bytes(backend.data))
    assert ledger.check(2, bytes(backend.data[8192:]))


def test_the_twin_and_the_kernel_agree(setup: Any) -> None:
    """Each overwrites and checks what the other has written."""
    setup.serve(1 << 20)
    disk = setup.connect(queues=2)
    ledger = Ledger(512 << 10, 4096, 64 << 10)
    plan = Plan(offset=ledger.offset, length=512 << 10, write_percent=50, verify="all", depth=8, requests=500)
    for seed in range(3):
        assert naive.load(disk, ledger, 200, seed) == 0
        result = Load(disk, replace(plan, seed=seed), ledger).run(30)
        assert result.right
        assert result.verified > 0


def _lose_writes(backend: Any) -> None:
    execute = backend.execute

    def lossy(ring: Any, request: Any) -> int:
        if request.op == blkif.OP_WRITE and len(backend.requests) % 50 == 0:
            return 0
        return int(execute(ring, request))

    backend.execute = lossy


def _tear_writes(backend: Any) -> None:
    execute = backend.execute

    def torn(ring: Any, request: Any) -> int:
        if request.op == blkif.OP_WRITE and len(backend.requests) % 50 == 0:
            gref, first, _ = request.segments[0]
            request.segments = [(gref, first, first + 1)]
        return int(execute(ring, request))

    backend.execute = torn


def _reorder_writes(backend: Any) -> None:
    execute = backend.execute
    late: dict[int, bytes] = {}

    def reordered(ring: Any, request: Any) -> int:
        at = request.sector * 512
        before = bytes(backend.data[at : at + 4096])
        status = int(execute(ring, request))
        if request.op == blkif.OP_WRITE:
            if at in late:
                backend.data[at : at + 4096] = late.pop(at)
            elif len(backend.requests) % 20 == 0:
                late[at] = bytes(backend.data[at : at + 4096])
                assert before is not None
        return status

    backend.execute = reordered


def _misplace_reads(backend: Any) -> None:
    execute = backend.execute

    def misplaced(ring: Any, request: Any) -> int:
        if request.op == blkif.OP_READ and request.sector >= 8 and len(backend.requests) % 50 == 0:
            request.sector -= 8
        return int(execute(ring, request))

    backend.execute = misplaced


@pytest.mark.parametrize("fault", [_lose_writes, _tear_writes, _reorder_writes, _misplace_reads])
def test_a_fault_is_found(setup: Any, fault: Any) -> None:
    backend = setup.serve(256 << 10)
    disk = setup.connect()
    fault(backend)
    load = Load(disk, Plan(depth=8, write_percent=60, verify="all", requests=4000))
    result = load.run(60)
    assert result.mismatches > 0
    assert result.errors == 0
    assert result.mismatch is not None
    assert f"offset {result.mismatch.offset}" in str(load)


def test_an_error_is_counted_and_its_block_unknown(setup: Any) -> None:
    backend = setup.serve(256 << 10)
    disk = setup.connect()
    backend.answer = lambda request, honest: [(*honest[:2], (-(request.id >> 32) % 7 == 3 and -1) or 0)]
    result = Load(disk, Plan(depth=4, write_percent=60, verify="all", requests=1000)).run(30)
    assert result.errors > 0
    assert result.mismatches == 0
    assert result.first_error is not None


def test_plans_that_make_no_sense(setup: Any) -> None:
    setup.serve(sector_size=4096)
    disk = setup.connect()
    for plan in (
        Plan(block_size=512),
        Plan(block_size=1 << 20),
        Plan(offset=1 << 30),
        Plan(length=100),
        Plan(verify="some"),
    ):
        with pytest.raises(ConfigError):
            Load(disk, plan)
