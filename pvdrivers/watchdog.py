"""Signs of life for the service manager, while there is life: in the control thread, and in every worker."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .notify import Notifier

if TYPE_CHECKING:
    from .host import Host

log = logging.getLogger("pvdrivers.host")


class Watchdog:
    """A sign of life twice in the time after which the manager would end us, unless a worker does not answer.

    The control thread shows that it turns by sending it. A worker shows it by going round its loop once after its
    doorbell was rung; it is asked anew each time, so a worker that hangs is found out within half that time.
    """

    def __init__(self, host: Host, notifier: Notifier) -> None:
        self._host = host
        self._notifier = notifier
        self._told = False

    def start(self) -> None:
        """Begin with it, if anybody waits for it."""
        if self._notifier.watchdog_seconds is not None:
            self._host.context.workers.alive()
            self._notifier.alive()
            self._later()

    def _later(self) -> None:
        assert self._notifier.watchdog_seconds is not None
        self._host.later(self._notifier.watchdog_seconds / 2, self._look)

    def _look(self) -> None:
        if self._host.context.workers.alive():
            self._notifier.alive()
            self._told = False
        elif not self._told:
            self._told = True
            log.error("a worker does not answer: no sign of life is given to the service manager until it does")
        self._later()
