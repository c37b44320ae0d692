"""Letting go of every device, so that another process can have it: at the end of this one, or for a newer version.

A device that is free is named at once, while others are still being drained. If nobody wants them after all, the host
serves all of them again, as it would after the death of a predecessor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from .finder import Key, key_of
from .life import Life

if TYPE_CHECKING:
    from .host import Host

log = logging.getLogger("pvdrivers.host")

SECONDS = 30.0
"""How long devices have to finish what is in flight."""


class HandOver:
    """One attempt. While it lasts the host takes no device."""

    def __init__(
        self,
        host: Host,
        released: Callable[[Life, float | None], None],
        finished: Callable[[dict[Key, float | None]], None],
    ) -> None:
        """`released` is called with each device that is free, and when it was stopped (CLOCK_MONOTONIC; None if it was
        not connected). `finished` is called once, after the last of them or when time is up, with those that are not
        free: their requests are under way."""
        self._host = host
        self._released = released
        self._finished = finished
        self._left: dict[Key, float | None] = {}
        self.over = False
        """All are free, or time is up."""
        host.finder.passive = True
        host.letting_go = self
        lives = list(host.lives.values())
        for life in lives:
            self._left[key_of(life.ident)] = host.now() if life.connected else None
        self._timer = host.later(SECONDS, partial(self._end, f"it did not finish within {SECONDS:g} s"))
        for life in lives:
            life.troubles.gone()
            life.hand_over(partial(self._done, life))
        self.look()

    def look(self) -> None:
        """It ends with the last device that can be free before the process has ended."""
        if len(self._left) <= self._host.in_use:
            self._end("its worker has ended")

    def _done(self, life: Life) -> None:
        key, host = key_of(life.ident), self._host
        stopped = self._left.pop(key, None)
        host.forget(life)
        if host.letting_go is self:
            self._released(life, stopped)
            host.unwatch(life)
        else:
            host.unwatch(life)
            host.finder.discover()  # it took so long that all is ours again
        self.look()

    def _end(self, why: str) -> None:
        if self.over:
            return
        self.over = True
        self._timer.cancel()
        for key in self._left:
            log.error("%s-%d-%d: is left as it is: %s", *key, why)
        self._finished(dict(self._left))

    def take_back(self) -> None:
        """Nobody will take them: the host has all of them again."""
        self.over = True
        self._timer.cancel()
        self._host.letting_go = None
        self._host.finder.passive = False
        self._host.finder.take_waiting()
        self._host.finder.discover()
