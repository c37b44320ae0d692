"""Whatever the other end, the toolstack, the disk and the store do: a life stays defined, and so do its neighbours."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pvdrivers.device import NotRecoverable
from pvdrivers.errors import ConfigError, PlatformError, ProtocolViolation, StoreError
from pvdrivers.life import Life
from pvdrivers.pace import RETRY_SECONDS
from pvdrivers.xenbus import XenbusState as S
from tests.device.bed import Bed, Disk, Guest, new_bed, no_own_faults

STATES = st.sampled_from([*range(9), *range(9), 9, -1, 1 << 40, "", "four", b"\xff\n", "4 4", "5" * 300])
NUMBERS = st.sampled_from([1, 8, 0, -1, 1 << 31, "", "x", "0x1", b"\xff", "1" * 400])
TROUBLES: list[tuple[str, type[BaseException]]] = [
    ("advertise", StoreError), ("advertise", ConfigError), ("connect", StoreError), ("connect", PlatformError),
    ("connect", ConfigError), ("connect", OSError), ("recover", NotRecoverable), ("recover", StoreError),
]  # fmt: skip


class Lives(RuleBasedStateMachine):
    """One device with everything against it, and a neighbour that wants nothing but to be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.own_faults = self.stack.enter_context(no_own_faults())
        self.bed: Bed = self.stack.enter_context(new_bed())
        self.guest: Guest = self.bed.guest(5)
        self.life: Life
        self.disk: Disk
        self.disks: list[Disk] = []

    @initialize(backend=st.integers(1, 8), frontend=STATES, keys=st.booleans())
    def begin(self, backend: int, frontend: Any, keys: bool) -> None:
        """Any pair of states may be what a process finds when it starts."""
        self.other, self.neighbour, self.other_disk = self.bed.connected(6)
        self.guest.attach()
        if keys:
            self.guest.publish()
        self.guest.say(frontend)
        self.bed.dom0.write(self.guest.back + "/state", backend)
        self._new_life()

    def _new_life(self) -> None:
        self.life, self.disk = self.bed.life(self.guest)
        self.disks.append(self.disk)
        self.life.look()

    # The guest

    @rule(state=STATES, heard=st.booleans())
    def guest_says(self, state: Any, heard: bool) -> None:
        self.guest.say(state)
        if heard:
            self.life.handle_frontend_change()

    @rule(name=st.sampled_from(["ring_ref", "event_channel"]), value=NUMBERS)
    def guest_writes_a_key(self, name: str, value: Any) -> None:
        self.guest.say(int(S.Initialised), **{name: value})

    @rule()
    def guest_is_honest_for_a_moment(self) -> None:
        self.guest.publish()
        self.life.handle_frontend_change()

    @rule(name=st.sampled_from(["/state", "/ring-ref", ""]))
    def guest_removes(self, name: str) -> None:
        # The directory itself is in dom0's: a guest can only empty it.
        names = self.guest.guest.ls(self.guest.front) or []
        for found in names if name == "" else [name[1:]]:
            self.guest.guest.rm(f"{self.guest.front}/{found}")
        self.life.handle_frontend_change()

    @rule(count=st.integers(1, 300))
    def guest_storms(self, count: int) -> None:
        self.life.handle_frontend_change(count)

    @rule()
    def guest_breaks_its_ring(self) -> None:
        self.life.fault("producer index beyond the ring")

    # The toolstack

    @rule(state=st.integers(0, 9))
    def toolstack_writes_our_state(self, state: int) -> None:
        if self.guest.state() is not None:
            self.bed.dom0.write(self.guest.back + "/state", state)
            self.life.handle_backend_change(["state"])

    @rule()
    def toolstack_changes_a_key(self) -> None:
        if self.guest.state() is not None:
            self.bed.dom0.write(self.guest.back + "/params", "other.img")
            self.life.handle_backend_change(["params"])

    @rule()
    def toolstack_unplugs(self) -> None:
        if self.guest.state() is not None:
            self.guest.unplug()
            self.life.handle_backend_change(["online", "state"])

    @rule()
    def toolstack_removes(self) -> None:
        self.bed.dom0.rm(self.guest.back)
        self.life.handle_backend_change([""])

    @precondition(lambda self: self.life.gone)
    @rule()
    def toolstack_attaches_again(self) -> None:
        self.guest.attach()
        self._new_life()

    # The host

    @rule(trouble=st.sampled_from(TROUBLES))
    def the_disk_has_trouble(self, trouble: tuple[str, type[BaseException]]) -> None:
        what, kind = trouble
        self.disk.troubles.setdefault(what, []).append(kind("ordered by the test"))

    @rule()
    def the_class_finds_a_lie(self) -> None:
        lie = ProtocolViolation(5, str(self.life.ident), "keys changed during connect")
        self.disk.troubles.setdefault("connect", []).append(lie)

    @rule(hold=st.booleans())
    def jobs_take_long(self, hold: bool) -> None:
        self.bed.control.hold = hold
        if not hold:
            self.bed.control.work()

    @rule(seconds=st.sampled_from([0.1, 1.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.bed.control.pass_time(seconds)

    @rule()
    def the_store_is_lost(self) -> None:
        self.bed.control.store.close()
        self.life.look()
        self.bed.control._store = self.bed.served.client()
        self.life.look()
        self.neighbour.look()

    @rule()
    def the_process_ends_and_another_comes(self) -> None:
        if self.life.gone or self.guest.state() is None:
            return
        done: list[int] = []
        self.life.hand_over(lambda: done.append(1))
        self.bed.control.hold = False
        self.bed.control.work()
        assert done == [1]
        if not self.life.gone and self.guest.state() is not None:
            self._new_life()

    # What holds, whatever happened

    @invariant()
    def nothing_is_our_fault(self) -> None:
        assert not self.own_faults.found, self.own_faults.found[0]

    @invariant()
    def connections_are_counted(self) -> None:
        if self.bed.control.jobs:
            return
        for disk in self.disks:
            assert disk.attached == (disk is self.disk and self.life.connected)

    @invariant()
    def a_device_that_is_gone_holds_nothing(self) -> None:
        if self.life.gone:
            assert not self.life.connected and self.disk.calls[-1] == "removed"

    @invariant()
    def the_neighbour_is_served(self) -> None:
        self.neighbour.handle_backend_change(["state"])
        if not self.bed.control.jobs:
            assert self.other.state() == S.Connected and self.other_disk.attached
            assert self.other_disk.calls == []

    def teardown(self) -> None:
        try:
            self._an_honest_guest_gets_its_disk()
            self._it_can_be_removed()
        finally:
            self.stack.close()

    def _settle(self) -> None:
        self.bed.control.hold = False
        self.bed.control.work()
        self.life.look()
        self.bed.control.pass_time(3 * RETRY_SECONDS[1])

    def _an_honest_guest_gets_its_disk(self) -> None:
        """After all that, a guest that does as it should is served, unless the device was removed."""
        if not hasattr(self, "life"):
            return
        self.disk.troubles.clear()
        self._settle()
        if self.life.gone:
            return
        online = self.bed.dom0.read(self.guest.back + "/online")
        if online != b"1":
            return
        if self.guest.state() in (0, 9):  # only the toolstack's own nonsense leaves that
            self.bed.dom0.write(self.guest.back + "/state", 1)
        # What an operator does about a wrong configuration.
        self.bed.dom0.write(self.guest.back + "/params", "right.img")
        self.life.handle_backend_change(["params"])
        for state in (S.Closing, S.Closed, S.Initialising):
            self.guest.say(int(state))
            self._settle()
        assert self.guest.state() == S.InitWait
        self.guest.publish()
        self._settle()
        assert self.guest.state() == S.Connected and self.life.connected and self.life.error == ""

    def _it_can_be_removed(self) -> None:
        if not hasattr(self, "life"):
            return
        removed_before = self.life.gone  # then the toolstack has to clean up
        self.guest.destroy()
        self._settle()
        assert self.life.gone and not self.disk.attached
        assert removed_before or self.guest.state() is None


Lives.TestCase.settings = settings(stateful_step_count=30)
TestLives = Lives.TestCase
