"""What is not as it should be with one device, for the log and for `pvdrivers stats`: each is named once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from .control import Control, Timer
from .nodes import Nodes
from .xenbus import BadState, XenbusState

log = logging.getLogger("pvdrivers.device")

SLOW_SECONDS = 60.0
"""How long a guest may leave a disk unanswered before that is said."""
_GUEST_TO_MOVE = {
    XenbusState.InitWait: "its guest has not connected",
    XenbusState.Closing: "its guest has not let go of it",
}

_OVER = {
    "grants": "its guest's pages are mapped again",
    "events": "its guest sends no events without end any more",
    "port": "its port is there again",
    "stalled": "its guest has buffers again",
}


class Troubles:
    """The troubles of one device by kind, each a line for people. `changed` is called when they are others.

    stale     its frontend or its domain is gone
    waiting   for something of the toolstack's that is under way: a hotplug script, a migration
    draining  the I/O of a process that has ended is still under way
    storm     its frontend's state changes too often
    guest     the guest does not answer: it never connects, or does not let go
    quota     xenstore does not let us publish it
    unwatched nor watch it
    lost      xenstored was restarted, and knows nothing of it any more
    kernel    a backend of the kernel's, loaded while we serve it, has taken it
    events    its guest sends events with nothing behind them
    grants    Xen had no room to map its guest's pages, which are copied
    io        requests failed, by its store or by a page of its guest
    port      what a vif has on its other side, a TAP say, is gone
    """

    def __init__(self, name: str, control: Control, changed: Callable[[], None]) -> None:
        self.now: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        """How often each kind has come up."""
        self.since = time.time()
        """When the device came to the state that it is in."""
        self._name = name
        self._control = control
        self._timer: Timer | None = None
        self._changed = changed
        self._told: set[str] = set()  # texts of ours: what a guest has a part in goes by notice()
        self._times: dict[str, tuple[int, int]] = {}  # of each kind: in all, and on the rings that there are
        self._loud: set[str] = set()  # what the log has heard the beginning of

    def add(self, kind: str, text: str, level: int = logging.WARNING) -> None:
        """There is trouble of this kind. The log hears of each text once."""
        if self.now.get(kind) == text:
            return
        self.now[kind] = text
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if text not in self._told:
            self._told.add(text)
            log.log(level, "%s: %s", self._name, text)
        self._changed()

    def over(self, *kinds: str) -> None:
        """These kinds of trouble are over."""
        if any([self.now.pop(kind, None) is not None for kind in kinds]):
            self._changed()

    def notice(self, kind: str, text: str, times: int = 1) -> None:
        """What the workers say: trouble of this kind, which has come up so many `times` since the device was connected,
        or that it is over. The log hears of the end as well.

        It hears of the first, and then ever more rarely, whatever the words and however often the guest connects anew:
        a guest must not be able to fill a disk with our log.
        """
        if not text:
            if kind in self.now:
                self.over(kind)
                if kind in self._loud:
                    log.info("%s: %s", self._name, _OVER[kind])
        elif self.now.get(kind) != text:
            before, seen = self._times.get(kind, (0, 0))
            total = before + (times - seen if times > seen else times)  # no more than before: it counts anew
            self._times[kind] = total, times
            self.now[kind] = text
            self.counts[kind] = self.counts.get(kind, 0) + 1
            if total.bit_length() > before.bit_length():
                self._loud.add(kind)
                log.warning("%s: %s%s", self._name, text, f" ({total} so far)" if total > times > 0 else "")
            else:
                self._loud.discard(kind)
            self._changed()

    def violated(self, text: str, count: int) -> None:
        """The guest broke the protocol, for the `count`-th time: told in full, and then ever more rarely, as above."""
        if count & (count - 1) == 0:
            log.warning("%s%s", text, f" ({count} so far)" if count > 1 else "")

    def went(self, state: XenbusState) -> None:
        """The device is in this state from now on."""
        self.over("guest")
        self.since = time.time()
        self.gone()
        if state in _GUEST_TO_MOVE:
            self._timer = self._control.later(SLOW_SECONDS, partial(self._still, state))

    def _still(self, state: XenbusState) -> None:
        self.add("guest", f"{_GUEST_TO_MOVE[state]} for {SLOW_SECONDS:g} s; it is waited for", logging.INFO)

    def gone(self) -> None:
        """Nothing is waited for any more, and no timer keeps what belongs to the device."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def look_for_stale(self, nodes: Nodes, ours: XenbusState, theirs: XenbusState | BadState) -> None:
        """Name a directory of ours whose other end is gone; what to do about it says the table."""
        self.over("lost")
        if theirs is not XenbusState.Unknown or ours is XenbusState.Unknown:
            self.over("stale")
        elif nodes.stray:
            self.add("stale", "its frontend is another backend's; it is not served")
        elif not nodes.domain_exists():
            self.add("stale", "its domain is gone; the directory that it left is removed")
        elif ours is XenbusState.Closed:
            pass  # a toolstack is taking it away, and nothing of it is held
        elif ours is not XenbusState.Initialising:  # or the frontend's directory may be about to be written
            self.add("stale", "it has no frontend; it is not served until there is one")
