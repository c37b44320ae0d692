"""The handshake's table: every pair, what Linux does with the ones that matter, and where two honest ends get."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdrivers import xenbus
from pvdrivers.xenbus import (
    ADOPT,
    ADOPT_OFFLINE,
    TABLE,
    Action,
    BadState,
    Role,
    Step,
    XenbusState,
    adopt,
    parse_state,
    step,
)

S = XenbusState
A = Action
ALL = [(ours, theirs) for ours in S for theirs in S]
ACTIVE = {S.Initialised, S.Connected}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("online", [True, False])
def test_every_pair_is_defined(role: Role, online: bool) -> None:
    assert set(TABLE[role, online]) == set(ALL)
    assert set(ADOPT) == set(ADOPT_OFFLINE) == set(ALL)
    for ours, theirs in ALL:
        found = step(role, ours, theirs, online)
        assert isinstance(found, Step)
        if found.action is A.NOTHING:
            assert found.state is ours


# Written down by hand from xen-blkback/xenbus.c (frontend_changed) and xen-blkfront.c (blkback_changed).
LINUX_BACK = [
    (S.Closed, S.Initialising, S.InitWait, A.ADVERTISE),  # "prepare for reconnect"
    (S.Initialising, S.Initialising, S.InitWait, A.ADVERTISE),  # probe
    (S.InitWait, S.Initialising, S.InitWait, A.NOTHING),
    (S.InitWait, S.Initialised, S.Connected, A.CONNECT),
    (S.InitWait, S.Connected, S.Connected, A.CONNECT),  # a frontend that skips Initialised (netfront)
    (S.Connected, S.Initialised, S.Connected, A.NOTHING),
    (S.Connected, S.Connected, S.Connected, A.NOTHING),
    (S.Connected, S.Closing, S.Closing, A.SAY),
    (S.InitWait, S.Closing, S.Closing, A.SAY),
    (S.Connected, S.Closed, S.Closed, A.CLOSE),
    (S.Closing, S.Closed, S.Closed, A.CLOSE),
    (S.InitWait, S.Reconfiguring, S.Closing, A.REJECT),  # "saw state %d at frontend"
    (S.Closed, S.Closed, S.Closed, A.NOTHING),
    (S.Connected, S.Unknown, S.Closed, A.CLOSE),
]
LINUX_FRONT = [
    (S.Initialising, S.InitWait, S.Initialised, A.ADVERTISE),
    (S.Initialising, S.Initialising, S.Initialising, A.NOTHING),
    (S.Initialised, S.InitWait, S.Initialised, A.NOTHING),
    (S.Initialised, S.Connected, S.Connected, A.CONNECT),
    (S.Connected, S.Connected, S.Connected, A.REFRESH),
    (S.Connected, S.Closing, S.Closed, A.CLOSE),
    (S.Connected, S.Closed, S.Closed, A.CLOSE),
    (S.Initialised, S.Closing, S.Closed, A.CLOSE),
    (S.Connected, S.Unknown, S.Connected, A.NOTHING),
]


@pytest.mark.parametrize(("ours", "theirs", "state", "action"), LINUX_BACK)
def test_the_backend_does_as_linux(ours: S, theirs: S, state: S, action: A) -> None:
    assert step(Role.BACK, ours, theirs) == (state, action)


@pytest.mark.parametrize(("ours", "theirs", "state", "action"), LINUX_FRONT)
def test_the_frontend_does_as_linux(ours: S, theirs: S, state: S, action: A) -> None:
    assert step(Role.FRONT, ours, theirs) == (state, action)


def test_a_frontend_that_goes_back_to_initialised_is_connected_anew() -> None:
    assert step(Role.BACK, S.Connected, S.Initialised, before=S.Connected) == (S.Connected, A.RECONNECT)
    assert step(Role.BACK, S.Connected, S.Initialised, before=S.Initialised).action is A.NOTHING
    assert step(Role.BACK, S.Connected, S.Initialised, online=False, before=S.Connected).state is S.Closing


def test_a_backend_that_is_connected_in_name_only_connects() -> None:
    for theirs in ACTIVE:
        assert step(Role.BACK, S.Connected, theirs, connected=False) == (S.Connected, A.RECONNECT)
    for ours, theirs in ALL:
        if ours is not S.Connected or theirs not in ACTIVE:
            assert step(Role.BACK, ours, theirs, connected=False) == step(Role.BACK, ours, theirs)
        assert step(Role.BACK, ours, theirs, False, connected=False) == step(Role.BACK, ours, theirs, False)


def test_offline_ends_in_removal() -> None:
    for ours, theirs in ALL:
        found = step(Role.BACK, ours, theirs, online=False)
        if theirs in (S.Unknown, S.Initialising, S.InitWait, S.Closed):
            assert found.action is A.REMOVE
        else:
            # An active frontend is asked to stop, and waited for.
            assert found.action is A.REMOVE or (found.state is S.Closing and found.action in (A.SAY, A.NOTHING))
        assert found.action not in (A.ADVERTISE, A.CONNECT, A.RECONNECT, A.RECOVER)


def test_rings_are_only_used_of_a_frontend_that_has_published_them() -> None:
    for ours, theirs in ALL:
        if step(Role.BACK, ours, theirs).action in (A.CONNECT, A.RECONNECT):
            assert theirs in ACTIVE
        found = adopt(ours, theirs)
        assert found.action not in (A.CONNECT, A.RECONNECT), "the first look may not be at live rings"
        if found.action is A.RECOVER:
            assert found.state is ours, "the guest must not notice"
            assert theirs not in (S.Unknown, S.Initialising, S.InitWait, S.Closed)
        assert (found.action is A.RECOVER) <= (ours in (S.Connected, S.Closing, S.Reconfiguring, S.Reconfigured))


def test_an_unplugged_device_is_taken_over_as_any_other() -> None:
    """Its guest may have it mounted, and waits for answers."""
    for ours, theirs in ALL:
        found, stays = adopt(ours, theirs, online=False), adopt(ours, theirs)
        if A.RECOVER in (found.action, stays.action):
            assert found == stays
            after = step(Role.BACK, ours, theirs, online=False)
            assert after == (S.Closing, A.NOTHING if ours is S.Closing else A.SAY), "the second look asks it to stop"
        else:
            assert found == step(Role.BACK, ours, theirs, online=False)


def test_who_leaves_drops_the_rings() -> None:
    """No step leads from a connected backend to a state without rings but by an action that drops them."""
    for theirs in S:
        for online in (True, False):
            found = step(Role.BACK, S.Connected, theirs, online)
            if found.state in (S.InitWait, S.Closed):
                assert found.action in (A.ADVERTISE, A.CLOSE, A.REMOVE)


# Two honest ends, in every order of their steps


def _moves(pair: tuple[S, S], back_online: bool, front_online: bool) -> Iterator[tuple[S, S]]:
    back, front = pair
    found = step(Role.BACK, back, front, back_online)
    if found.state is not back:
        yield found.state, front
    found = step(Role.FRONT, front, back, front_online)
    if found.state is not front:
        yield back, found.state


def _reachable(start: tuple[S, S], back_online: bool = True, front_online: bool = True) -> set[tuple[S, S]]:
    seen = {start}
    todo = [start]
    while todo:
        for pair in _moves(todo.pop(), back_online, front_online):
            if pair not in seen:
                seen.add(pair)
                todo.append(pair)
    return seen


LIVE = [pair for pair in ALL if S.Unknown not in pair]
# Reconfiguring is begun by somebody on purpose and answered by a class that knows it (vscsi); no end gets there
# by chance.
ORDINARY = [pair for pair in LIVE if not {S.Reconfiguring, S.Reconfigured} & set(pair)]


def _named(pair: tuple[S, S]) -> str:
    return f"{pair[0].name}-{pair[1].name}"


@pytest.mark.parametrize("start", ORDINARY, ids=_named)
def test_two_honest_ends_connect_from_anywhere(start: tuple[S, S]) -> None:
    for pair in _reachable(start):
        assert (S.Connected, S.Connected) in _reachable(pair), f"stuck at {pair}"
    assert list(_moves((S.Connected, S.Connected), True, True)) == []


@pytest.mark.parametrize("start", ORDINARY, ids=_named)
def test_a_frontend_that_wants_to_close_is_let_go(start: tuple[S, S]) -> None:
    for pair in _reachable(start, front_online=False):
        assert any(front is S.Closed for _, front in _reachable(pair, front_online=False)), f"stuck at {pair}"


@pytest.mark.parametrize("start", LIVE, ids=_named)
def test_an_unplugged_device_goes(start: tuple[S, S]) -> None:
    for pair in _reachable(start, back_online=False):
        ends = _reachable(pair, back_online=False)
        assert any(step(Role.BACK, *end, online=False).action is A.REMOVE for end in ends), f"stuck at {pair}"


# Parsing


@pytest.mark.parametrize("state", S)
def test_states_are_parsed(state: S) -> None:
    assert parse_state(str(int(state)).encode()) is state
    assert parse_state(b"%d\n" % state) is state
    assert parse_state(b"0%d" % state) is state  # scanf's idea of a number


def test_a_missing_node_is_unknown() -> None:
    assert parse_state(None) is S.Unknown


@pytest.mark.parametrize(
    "raw", [b"", b"9", b"-1", b"99999999999999999999", b"0x4", b"Connected", b"4 5", b"\xff\xfe", b"\0", b"\xb2"]
)
def test_garbage_is_a_value(raw: bytes) -> None:
    found = parse_state(raw)
    assert isinstance(found, BadState)
    assert found.text.isascii() and found.text.isprintable() and len(found.text) < 80


@given(st.binary(max_size=5000))
def test_parsing_never_raises(raw: bytes) -> None:
    found = parse_state(raw)
    assert isinstance(found, S) or len(found.text) < 80


def test_the_documentation_is_the_table() -> None:
    docs = Path(xenbus.__file__).parent.parent / "docs" / "xenbus.md"
    assert docs.read_text() == xenbus.markdown(), "run: python -m pvdrivers.xenbus"
