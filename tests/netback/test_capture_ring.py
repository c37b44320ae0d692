"""The ring of a capture: what is written is read, in order, and what finds no room is counted, whatever the sizes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from netback.captured import capture_sent
from netback.records import PACKET, PORT, RX_QUEUE
from pvdrivers.capture_memory import CaptureMemory
from pvdrivers.capture_ring import RECORD, RECORD_SIZE, SHARED, put_record, take_room
from pvdrivers.cli.capture import Ring
from pvdrivers.worker.records import RING, WORKER
from rings.atomics import records
from rings.jit import kernel

SIZE = 4096
STEPS = st.lists(st.one_of(st.integers(0, 1500), st.just("read")), max_size=80)


@given(STEPS)
def test_against_a_list(steps: list[int | str]) -> None:
    memory = CaptureMemory(SIZE, 1500)
    ring = Ring(memory.fd)
    expected: list[bytes] = []
    got: list[bytes] = []
    lost = used = 0
    for k, step in enumerate([*steps, "read"]):
        if step == "read":
            got += [data for _, data in ring.take()]
            assert got == expected
            continue
        assert isinstance(step, int)
        data = np.full(step, k % 256, np.uint8)
        at = int(take_room(memory.address, 3, step))
        if at == 0:
            lost += 1
            used = int(ring.shared["written"]) - int(ring.shared["read"])
            assert used + 2 * (RECORD_SIZE + 1507) > SIZE  # there was not much room, and perhaps an end to be skipped
            continue
        record = records(at, 1, RECORD)[0]
        record["size"], record["queue"] = step, 3
        put_record(memory.address, at, int(data.ctypes.data), step)
        expected.append(data.tobytes())
    assert int(ring.shared["taken"][3]) == len(expected)
    assert int(ring.shared["lost"][3]) == lost
    memory.close()


def test_a_reader_that_lies_has_nothing_overwritten_that_is_not_its_own() -> None:
    """`read` beyond `written`, or far behind: no room, and that is all."""
    memory = CaptureMemory(SIZE, 1500)
    ring = Ring(memory.fd)
    for lie in (1 << 40, -(1 << 62), 8):
        ring.shared["read"] = lie
        assert int(take_room(memory.address, 0, 100)) == 0
    ring.shared["read"] = 0
    assert int(take_room(memory.address, 0, 100)) != 0
    assert SHARED.itemsize < SIZE
    memory.close()


@kernel
def _sent(wa: int, ra: int, pa: int) -> None:
    capture_sent(wa, ra, pa)


def test_a_capture_that_ends_while_packets_are_sent() -> None:
    """Whoever is in the middle of a batch has looked before it ended."""
    worker, ring, port, packet = np.zeros(1, WORKER), np.zeros(1, RING), np.zeros(1, PORT), np.zeros(1, PACKET)
    queue, memory = np.zeros(1, RX_QUEUE), CaptureMemory(SIZE, 1500)
    queue[0]["index"] = 3
    ring[0]["device"], ring[0]["priv"] = port.ctypes.data, queue.ctypes.data
    data = np.arange(64, dtype=np.uint8)
    packet[0]["data"], packet[0]["have"], packet[0]["size"] = data.ctypes.data, 64, 64
    for there in (True, False, True):
        port[0]["capture"] = memory.address if there else 0
        _sent(worker.ctypes.data, ring.ctypes.data, packet.ctypes.data)
    found = list(Ring(memory.fd).take())
    assert [data for _, data in found] == [data.tobytes()] * 2 and {int(head["queue"]) for head, _ in found} == {3}
    memory.close()
