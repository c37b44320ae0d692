"""How often one device is looked at, connected, tried again and written of: limits that no guest can get round."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

from .control import Backoff, Control, TokenBucket
from .xenbus import XenbusState

log = logging.getLogger("pvdrivers.device")

EVENTS = (32.0, 128.0)
"""Events of a frontend that are looked at: a second, and at once. A boot with firmware takes about ten."""
CONNECTS = (2.0, 20.0)
"""Connections offered and made: a second, and at once. A guest that reconnects in a circle waits its turn."""
NOTES = (0.02, 32.0)
"""Lines in the log about a guest's ordinary comings and goings: a second, and at once."""
QUIET_SECONDS = 1.0
"""How long a frontend over its limit is not watched; then it is looked at, once."""
RETRY_SECONDS = (0.25, 30.0)
"""The first wait after a failure that may pass, and the longest."""

Pair: TypeAlias = tuple[XenbusState, XenbusState]


class Pace:
    """The limits of one device. `look` is called when what was held back may be tried again."""

    def __init__(self, control: Control, look: Callable[[], None]) -> None:
        self.held: Pair | None = None
        """What failed in this pair of states is not tried again before a timer, or a change."""
        self._look = look
        self._retry = Backoff(control, self._due, *RETRY_SECONDS)
        self._events = TokenBucket(*EVENTS, now=control.now)
        self._connects = TokenBucket(*CONNECTS, now=control.now)
        self._notes = TokenBucket(*NOTES, now=control.now)

    def take_events(self, count: int) -> bool:
        """Whether so many events of the frontend may be looked at."""
        return self._events.take(count)

    def take_connect(self, pair: Pair) -> bool:
        """Whether to offer or make a connection now; if not, then in a while."""
        if self.held is not None:
            return False
        if self._connects.take():
            return True
        self.hold(pair, QUIET_SECONDS)
        return False

    def note(self, name: object, text: str) -> None:
        """A line in the log about what is ordinary, if one is in order."""
        if self._notes.take():
            log.info("%s: %s", name, text)

    def hold(self, pair: Pair, seconds: float | None = None) -> None:
        """What was done in this pair of states is done again in `seconds`, or each time twice as late."""
        self.held = pair
        self.again(seconds)

    def hold_still(self, pair: Pair) -> None:
        """Nothing is done in this pair of states until something changes."""
        self.held = pair

    def wait(self, pair: Pair, seconds: float) -> None:
        """hold() for what is no failure, and no guest's doing: it does not count."""
        self._connects.give_back()
        self.hold(pair, seconds)

    def again(self, seconds: float | None = None) -> None:
        """Look in `seconds`, or each time twice as late."""
        if seconds is None:
            self._retry.again()
        else:
            self._retry.after(seconds)

    def release(self) -> None:
        """What was held back may be done now, and waits begin short again."""
        self.held = None
        self._retry.reset()

    def _due(self) -> None:
        self.held = None
        self._look()
