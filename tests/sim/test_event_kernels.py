"""The two event channel ABIs against a naive model, and the FIFO ABI's order and size."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pvdrivers.invoke import invoke
from pvdrivers.sim import event_kernels as k
from pvdrivers.sim import event_seam, wire
from pvdrivers.sim.events import EventMemory
from pvdrivers.windows import view
from tests.sim.naive_events import NaiveEvents

deliver, take, unmask = invoke(event_seam.event_deliver), invoke(event_seam.event_next), invoke(event_seam.event_unmask)
mask, forget = invoke(event_seam.event_mask), invoke(event_seam.event_forget)

ABIS = {"2l": (wire.PORTS_2L, k.ABI_2L), "fifo": (wire.PORTS_FIFO, k.ABI_FIFO)}


@pytest.fixture(params=list(ABIS))
def memory(request: pytest.FixtureRequest) -> Iterator[EventMemory]:
    memory = EventMemory(*ABIS[request.param])
    memory.priorities[:] = k.FIFO_PRIORITY_DEFAULT
    yield memory
    memory.close()


@pytest.fixture
def fifo() -> Iterator[EventMemory]:
    memory = EventMemory(*ABIS["fifo"])
    memory.priorities[:] = k.FIFO_PRIORITY_DEFAULT
    yield memory
    memory.close()


def drained(memory: EventMemory) -> list[int]:
    ports = []
    while (port := take(memory.ctx)) >= 0:
        ports.append(port)
    return ports


def test_one_event(memory: EventMemory) -> None:
    assert drained(memory) == []
    for port in (1, 63, 64, 4095):
        assert deliver(memory.ctx, port) == 0
        assert drained(memory) == [port]
        unmask(memory.ctx, port)
        assert drained(memory) == []


def test_ports_that_do_not_exist(memory: EventMemory) -> None:
    for port in (0, -1, memory.limit, 1 << 40, -(1 << 60)):
        assert deliver(memory.ctx, port) < 0
        assert mask(memory.ctx, port) < 0
        assert unmask(memory.ctx, port) < 0
        assert forget(memory.ctx, port) < 0
    assert drained(memory) == []


def test_coalescing(memory: EventMemory) -> None:
    for _ in range(10):
        deliver(memory.ctx, 5)
    assert drained(memory) == [5]
    for _ in range(10):
        deliver(memory.ctx, 5)
    assert drained(memory) == []  # masked since it was taken
    unmask(memory.ctx, 5)
    assert drained(memory) == [5]


def test_masking(memory: EventMemory) -> None:
    mask(memory.ctx, 9)
    deliver(memory.ctx, 9)
    deliver(memory.ctx, 10)
    assert drained(memory) == [10]
    unmask(memory.ctx, 9)
    assert drained(memory) == [9]


def test_masked_after_it_was_queued(memory: EventMemory) -> None:
    deliver(memory.ctx, 9)
    mask(memory.ctx, 9)
    assert drained(memory) == []
    unmask(memory.ctx, 9)
    assert drained(memory) == [9]


def test_a_closed_port_is_not_delivered(memory: EventMemory) -> None:
    for port in (9, 10, 11):
        deliver(memory.ctx, port)
    forget(memory.ctx, 10)
    assert sorted(drained(memory)) == [9, 11]
    deliver(memory.ctx, 10)
    assert drained(memory) == [10]


def test_the_words_of_the_2_level_abi() -> None:
    """public/xen.h: the bits are where a guest that knows struct shared_info looks for them."""
    memory = EventMemory(*ABIS["2l"])
    words = view(int(memory.record["shared"][0]), 512, "u8")
    deliver(memory.ctx, 64 * 5 + 3)
    assert words[k.PENDING // 8 + 5] == 1 << 3
    assert words[k.PENDING_SEL // 8] == 1 << 5
    assert words[k.UPCALL_PENDING // 8] & 0xFF == 1
    mask(memory.ctx, 4095)
    assert words[k.MASK // 8 + 63] == 1 << 63
    memory.close()


def test_the_words_of_the_fifo_abi(fifo: EventMemory) -> None:
    """public/event_channel.h: PENDING 31, MASKED 30, LINKED 29, LINK 0..16; head[priority] of the control block."""
    words = view(int(fifo.record["words"][0]), 131072, "u4")
    control = view(int(fifo.record["control"][0]), 18, "u4")
    deliver(fifo.ctx, 100)
    deliver(fifo.ctx, 131071)
    assert words[100] == 1 << 31 | 1 << 29 | 131071
    assert words[131071] == 1 << 31 | 1 << 29
    assert control[0] == 1 << 7
    assert control[2 + 7] == 100
    assert drained(fifo) == [100, 131071]
    assert words[100] == 1 << 30


def test_fifo_order_by_priority_then_arrival(fifo: EventMemory) -> None:
    order = random.Random(4)
    ports = order.sample(range(1, fifo.limit), 4000)
    for port in ports:
        fifo.priorities[port] = order.randrange(16)
        deliver(fifo.ctx, port)
    assert drained(fifo) == sorted(ports, key=lambda port: int(fifo.priorities[port]))


def test_fifo_a_higher_priority_overtakes(fifo: EventMemory) -> None:
    for port in range(1, 11):
        deliver(fifo.ctx, port)
    assert [take(fifo.ctx) for _ in range(3)] == [1, 2, 3]
    fifo.priorities[50] = 0
    deliver(fifo.ctx, 50)
    assert drained(fifo) == [50, *range(4, 11)]


@pytest.mark.jit_only("131,072 ports take minutes in the interpreter")
def test_fifo_every_port_at_every_priority(fifo: EventMemory) -> None:
    for turn in range(2):
        expected: list[list[int]] = [[] for _ in range(16)]
        for port in range(1, fifo.limit):
            fifo.priorities[port] = (port * 7 + turn) % 16
            expected[int(fifo.priorities[port])].append(port)
            assert deliver(fifo.ctx, port) == 0
        assert drained(fifo) == [port for queue in expected for port in queue]
        for port in range(1, fifo.limit):
            unmask(fifo.ctx, port)
    assert drained(fifo) == []


def test_2_level_every_port() -> None:
    memory = EventMemory(*ABIS["2l"])
    for port in range(1, 4096):
        deliver(memory.ctx, port)
    assert sorted(drained(memory)) == list(range(1, 4096))
    memory.close()


@given(st.integers(0, 63), st.integers(0, 2**63 - 1))
def test_lowest_bit(n: int, above: int) -> None:
    word = (1 << n | above << n) & (1 << 64) - 1
    signed = word - (1 << 64) if word >> 63 else word
    assert k.lowest_bit(signed) == n


PORTS = [1, 2, 3, 62, 63, 64, 65, 127, 128, 700, 4031, 4094, 4095]


class EventsMachine(RuleBasedStateMachine):
    """Any order of signals, masks and takes: nothing is lost, nothing is invented, and it comes by priority."""

    ports = st.sampled_from(PORTS)

    @initialize(abi=st.sampled_from(sorted(ABIS)))
    def start(self, abi: str) -> None:
        self.memory = EventMemory(*ABIS[abi])
        self.memory.priorities[:] = k.FIFO_PRIORITY_DEFAULT
        self.model = NaiveEvents()

    @rule(port=ports)
    def signal(self, port: int) -> None:
        deliver(self.memory.ctx, port)
        self.model.signal(port)

    @rule(port=ports)
    def mask(self, port: int) -> None:
        mask(self.memory.ctx, port)
        self.model.mask(port)

    @rule(port=ports)
    def unmask(self, port: int) -> None:
        unmask(self.memory.ctx, port)
        self.model.unmask(port)

    @rule(port=ports)
    def forget(self, port: int) -> None:
        forget(self.memory.ctx, port)
        self.model.forget(port)

    @rule(port=ports, priority=st.integers(0, 15))
    def set_priority(self, port: int, priority: int) -> None:
        self.memory.priorities[port] = priority

    @rule()
    def take_one(self) -> None:
        port = take(self.memory.ctx)
        if port < 0:
            assert not self.model.deliverable()
        else:
            self.model.took(port)

    @rule()
    def take_all(self) -> None:
        for port in drained(self.memory):
            self.model.took(port)
        assert not self.model.deliverable()

    @invariant()
    def words_agree(self) -> None:
        if not hasattr(self, "memory"):
            return
        if self.memory.fifo:
            words = view(int(self.memory.record["words"][0]), 4096, "u4")
            pending = {p for p in PORTS if words[p] >> 31}
        else:
            words = view(int(self.memory.record["shared"][0]) + k.PENDING, 64, "u8")
            pending = {p for p in PORTS if int(words[p >> 6]) >> (p & 63) & 1}
        assert pending == self.model.pending

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()


TestEventsAgainstTheModel = EventsMachine.TestCase
TestEventsAgainstTheModel.settings = settings(max_examples=60, stateful_step_count=60)
