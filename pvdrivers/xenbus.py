"""The xenbus handshake as a table: pure, no I/O.

Both ends of a device have a `state` node, and each acts on what it reads at the other. What to do for each
pair of states is data here, so that it can be read, tested and printed (docs/xenbus.md) whole. The states are
those of xen/include/public/io/xenbus.h; what the ends do is what Linux does (xen-blkback/xenbus.c, xen-
blkfront.c, xenbus_client.c), and where not, the note at the table says so and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple


class XenbusState(IntEnum):
    """enum xenbus_state."""

    Unknown = 0  # no such node
    Initialising = 1
    InitWait = 2  # the backend has published its features and waits for the frontend's keys
    Initialised = 3  # the frontend has published its rings and ports and waits for the backend
    Connected = 4
    Closing = 5
    Closed = 6
    Reconfiguring = 7
    Reconfigured = 8


class Role(Enum):
    """Which end of the device is asking."""

    BACK = "backend"
    FRONT = "frontend"


class Action(Enum):
    """What goes with a new state. The state is always written last, in one transaction with the keys."""

    NOTHING = "nothing"
    SAY = "say"  # write the new state, nothing else
    ADVERTISE = "advertise"  # drop a connection if there is one; open what is needed, publish what is offered
    CONNECT = "connect"  # check the other end's keys and use its rings
    RECONNECT = "reconnect"  # drop the connection, then as CONNECT (frontend: publish new rings)
    RECOVER = "recover"  # take over a connection of a process that died; the other end must not notice
    REFRESH = "refresh"  # frontend: the backend rewrote its state to have its keys read again (resize)
    RECONFIGURE = "reconfigure"  # do what the other end's Reconfiguring asks for
    CLOSE = "close"  # drain and drop the connection; the device stays and may connect again
    REMOVE = "remove"  # as CLOSE, and the device is no more
    REJECT = "reject"  # no honest peer gets there: a protocol violation; drop the connection, say Closing


class Step(NamedTuple):
    """The state to write, and what to do before it is written."""

    state: XenbusState
    action: Action


@dataclass(frozen=True)
class BadState:
    """What stood in a state node and is no state; `text` is safe to print."""

    text: str


def parse_state(raw: bytes | None) -> XenbusState | BadState:
    """The state in a node's value; None (no such node) is Unknown. Never raises."""
    if raw is None:
        return XenbusState.Unknown
    text = raw.strip(b" \t\n\0")  # Linux reads it with scanf, so some write it with a newline
    if len(text) <= 2 and text.isdigit() and int(text) <= max(XenbusState):
        return XenbusState(int(text))
    return BadState(ascii(raw[:16].decode("latin-1")) + ("..." if len(raw) > 16 else ""))


S = XenbusState
_LETTERS = {
    "S": Action.SAY,
    "A": Action.ADVERTISE,
    "C": Action.CONNECT,
    "N": Action.RECONNECT,
    "V": Action.RECOVER,
    "F": Action.REFRESH,
    "G": Action.RECONFIGURE,
    "X": Action.CLOSE,
    "R": Action.REMOVE,
    "!": Action.REJECT,
}
# A cell is an action's letter and the number of the new state; a dot changes nothing. Rows: our state, 0 to
# 8. Columns: the other end's state, 0 to 8.

_BACK = """
 .  .  .  .  .  .  .  .  .
 .  A2 A2 A2 A2 A2 A2 A2 A2
 X6 .  .  C4 C4 S5 X6 !5 !5
 X6 .  .  C4 C4 S5 X6 !5 !5
 X6 A2 A2 .  .  S5 X6 G8 .
 X6 X6 X6 .  .  .  X6 .  .
 .  A2 A2 A2 A2 .  .  .  .
 X6 A2 A2 .  .  S5 X6 G8 .
 X6 A2 A2 .  S4 S5 X6 .  .
"""
_BACK_NOTES = """\
* Unknown in our own row: the toolstack is still writing the directory.
* Initialising, Unknown: the frontend's directory may be written after ours; Linux refuses the device then.
* Closing, Connected: after a fault, or when the toolstack wrote our Closing (libxl's unplug, which waits for
  Closed): the frontend has to stop first. What still is connected goes on being served.
* Closing with a frontend that is not active (Unknown, Initialising, InitWait) closes at once, as QEMU does.
* Connected, Initialising: the frontend started over without closing (a crash kernel). Linux stays Connected
  for ever; here the rings, which are in pages of the old kernel, are dropped and the device is offered again.
* Connected, Initialised is the moment before the frontend's own Connected. If the frontend had been seen
  Connected before, it has published new rings: reconnect.
* Connected, Connected (or Initialised) where nothing is connected, as new rings could not be used when they came and
  their frontend went on: reconnect, or it would wait for ever.
* Closed, Initialised or Connected: a frontend that skipped Initialising is offered the device again.
* Unknown while the domain is there: closed and kept, so that a frontend directory that comes back connects.
  Linux and tapback remove the device; a toolstack that then unplugs it would wait for a state that never
  comes."""

_BACK_OFFLINE = """
 R0 R0 R0 R0 R0 R0 R0 R0 R0
 R6 R6 R6 S5 S5 S5 R6 S5 S5
 R6 R6 R6 S5 S5 S5 R6 S5 S5
 R6 R6 R6 S5 S5 S5 R6 S5 S5
 R6 R6 R6 S5 S5 S5 R6 S5 S5
 R6 R6 R6 .  .  .  R6 .  .
 R6 R6 R6 R6 R6 R6 R6 R6 R6
 R6 R6 R6 S5 S5 S5 R6 S5 S5
 R6 R6 R6 S5 S5 S5 R6 S5 S5
"""
_BACK_OFFLINE_NOTES = """\
* Offline is `online` = 0, our directory removed, or the domain itself gone.
* A frontend that is active gets Closing and is waited for; libxl removes its directory when it will not
  close."""

_ADOPT = """
 .  .  .  .  .  .  .  .  .
 .  A2 A2 A2 A2 A2 A2 A2 A2
 X6 A2 A2 A2 A2 S5 X6 !5 !5
 X6 A2 A2 A2 A2 S5 X6 !5 !5
 X6 A2 A2 V4 V4 V4 X6 V4 V4
 X6 X6 X6 V5 V5 V5 X6 V5 V5
 .  A2 A2 A2 A2 .  .  .  .
 X6 A2 A2 V7 V7 V7 X6 V7 V7
 X6 A2 A2 V8 V8 V8 X6 V8 V8
"""
_ADOPT_NOTES = """\
* The first look of a process that has nothing open and nothing mapped at a device that is in the store
  already.
* Closing is taken over as well: the guest may be waiting for requests before it closes. After a fault there
  is nothing to take over, the device says so, and the frontend's Closed is waited for."""

_ADOPT_OFFLINE = """
 R0 R0 R0 R0 R0 R0 R0 R0 R0
 R6 R6 R6 S5 S5 S5 R6 S5 S5
 R6 R6 R6 S5 S5 S5 R6 S5 S5
 R6 R6 R6 S5 S5 S5 R6 S5 S5
 R6 R6 R6 V4 V4 V4 R6 V4 V4
 R6 R6 R6 V5 V5 V5 R6 V5 V5
 R6 R6 R6 R6 R6 R6 R6 R6 R6
 R6 R6 R6 V7 V7 V7 R6 V7 V7
 R6 R6 R6 V8 V8 V8 R6 V8 V8
"""
_ADOPT_OFFLINE_NOTES = """\
* A disk that the guest has mounted, and does not let go of (Linux before 5.15), is served until it does: for
  as long as it takes, and by whoever comes next. What is said to the frontend follows from the second look."""

_FRONT = """
 .  .  .  .  .  .  .  .  .
 .  .  A3 A3 S5 X6 .  S5 S5
 .  .  A3 A3 S5 X6 .  S5 S5
 .  .  .  .  C4 X6 X6 .  .
 .  .  N3 .  F4 X6 X6 G7 F4
 X6 X6 X6 .  .  X6 X6 .  .
 .  S1 S1 S1 .  .  S1 .  .
 .  .  N3 .  S4 X6 X6 .  F4
 .  .  N3 .  S4 X6 X6 G7 .
"""
_FRONT_NOTES = """\
* Initialising, Connected: the backend still has the rings of somebody before us (a crash kernel's
  predecessor). It is closed first, as Linux does at boot (xenbus_probe_frontend.c, xenbus_reset_state); a
  plain wait would never end, and to connect would be to talk past each other.
* Initialising, Closed: wait, the backend will offer the device again.
* Connected, Connected: the backend rewrote its state to have its size read again.
* Connected, InitWait: another backend has come without closing: new rings, and what was in flight goes out
  again.
* Connected, Unknown or Initialising: the backend's domain is restarting; requests wait.
* Closed, Closed: who still wants the device goes back to Initialising."""

_FRONT_OFFLINE = """
 .  .  .  .  .  .  .  .  .
 X6 X6 X6 X6 X6 X6 X6 X6 X6
 X6 X6 X6 X6 X6 X6 X6 X6 X6
 X6 S5 S5 S5 S5 X6 X6 S5 S5
 X6 S5 S5 S5 S5 X6 X6 S5 S5
 X6 X6 X6 .  .  X6 X6 .  .
 .  .  .  .  .  .  .  .  .
 X6 S5 S5 S5 S5 X6 X6 S5 S5
 X6 S5 S5 S5 S5 X6 X6 S5 S5
"""
_FRONT_OFFLINE_NOTES = "* Offline: whoever uses the device wants it closed."


def _parse(text: str) -> dict[tuple[XenbusState, XenbusState], Step]:
    table = {}
    for ours, line in zip(XenbusState, text.split("\n")[1:-1]):
        for theirs, cell in zip(XenbusState, line.split()):
            step = Step(ours, Action.NOTHING) if cell == "." else Step(S(int(cell[1])), _LETTERS[cell[0]])
            table[ours, theirs] = step
    return table


TABLE = {
    (Role.BACK, True): _parse(_BACK),
    (Role.BACK, False): _parse(_BACK_OFFLINE),
    (Role.FRONT, True): _parse(_FRONT),
    (Role.FRONT, False): _parse(_FRONT_OFFLINE),
}
"""(role, online) -> {(ours, theirs): step}, all 81 pairs in each."""

ADOPT = _parse(_ADOPT)
"""The backend's first look at a device that a process before it may have served."""

ADOPT_OFFLINE = _parse(_ADOPT_OFFLINE)
"""The same, of a device that is not to stay."""


def step(
    role: Role,
    ours: XenbusState,
    theirs: XenbusState,
    online: bool = True,
    *,
    before: XenbusState | None = None,
    connected: bool = True,
) -> Step:
    """What an end does that is in state `ours` when the other is in `theirs`.

    `online`: the device is to stay; for a frontend, it is wanted. `before`: the other end's state when it was
    last looked at, which tells a frontend that went back to Initialised from one that has not gone on yet.
    `connected`: a backend that is Connected really is.
    """
    if role is Role.BACK and online and ours is S.Connected and theirs in (S.Initialised, S.Connected):
        if not connected or (before is S.Connected and theirs is S.Initialised):
            return Step(S.Connected, Action.RECONNECT)
    return TABLE[role, online][ours, theirs]


def adopt(ours: XenbusState, theirs: XenbusState, online: bool = True) -> Step:
    """What a backend that has just started does about a device it finds in state `ours`."""
    return (ADOPT if online else ADOPT_OFFLINE)[ours, theirs]


def markdown() -> str:
    """docs/xenbus.md: the tables as people read them. Written by ``python -m pvdrivers.xenbus``."""
    parts = [
        "# The xenbus handshake\n",
        "Made from the tables in `pvdrivers/xenbus.py` by `python -m pvdrivers.xenbus`; do not edit.\n",
        "A row is our state, a column the other end's. A cell is the action, and the state that is written\n"
        "after it; `-` changes nothing.\n",
        "\n".join(f"* **{action.value}**: {why}" for action, why in _MEANING.items()) + "\n",
    ]
    for title, table, notes in (
        ("Backend", TABLE[Role.BACK, True], _BACK_NOTES),
        ("Backend, offline", TABLE[Role.BACK, False], _BACK_OFFLINE_NOTES),
        ("Backend, first look", ADOPT, _ADOPT_NOTES),
        ("Backend, first look, offline", ADOPT_OFFLINE, _ADOPT_OFFLINE_NOTES),
        ("Frontend", TABLE[Role.FRONT, True], _FRONT_NOTES),
        ("Frontend, offline", TABLE[Role.FRONT, False], _FRONT_OFFLINE_NOTES),
    ):
        rows = ["| |" + "".join(f" {s} {s.name} |" for s in S), "|---|" + "---|" * len(S)]
        for ours in S:
            cells = (table[ours, theirs] for theirs in S)
            text = ("-" if c.action is Action.NOTHING else f"{c.action.value} {c.state}" for c in cells)
            rows.append(f"| **{ours} {ours.name}** |" + "".join(f" {t} |" for t in text))
        parts.append(f"## {title}\n\n" + "\n".join(rows) + f"\n\n{notes}\n")
    return "\n".join(parts)


_MEANING = {
    Action.SAY: "write the state, nothing else.",
    Action.ADVERTISE: "drop a connection if there is one; open what is needed; publish what is offered.",
    Action.CONNECT: "check the other end's keys and use its rings.",
    Action.RECONNECT: "drop the connection and make a new one.",
    Action.RECOVER: "take over the connection of a process that died; nothing is written.",
    Action.REFRESH: "read the backend's keys again.",
    Action.RECONFIGURE: "do what the other end's Reconfiguring asks for.",
    Action.CLOSE: "drain, drop the connection; the device stays and may connect again.",
    Action.REMOVE: "the same, and the device is no more.",
    Action.REJECT: "a protocol violation: drop the connection and name domain, device and violation.",
}


if __name__ == "__main__":
    from pathlib import Path

    (Path(__file__).resolve().parent.parent / "docs" / "xenbus.md").write_text(markdown())
