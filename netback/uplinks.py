"""Uplinks: ports of a switch that lead out of the process (`serve --uplink SWITCH=PORT`).

An uplink is opened when the first vif of its switch is advertised, and has its carrier while one is connected.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvdrivers.device import DeviceId
from pvdrivers.errors import ConfigError

from .outer import OuterPort
from .port import PortSpec, parse_uplink
from .records import ACCEPTS_ALL, MAX_QUEUES
from .switch import Switch

log = logging.getLogger(__name__)

DEFAULT_MTU = 1500
QUEUES = 4
"""Of an uplink; with more workers one for each, so that what a worker sends leaves by its own."""


def uplinks_of(options: Mapping[str, Any]) -> dict[str, PortSpec]:
    """What `serve --uplink` says, by switch. Raises ConfigError."""
    found: dict[str, PortSpec] = {}
    for text in options.get("uplinks") or ():
        try:
            switch, spec = parse_uplink(text)
        except ValueError as e:
            raise ConfigError(f"--uplink {e}") from None
        if switch in found:
            raise ConfigError(f"--uplink {text}: switch {switch} has one already, and two would be a loop")
        found[switch] = spec
    return found


class Uplink:
    """That of one switch. Kept with the switch, for as long as that is there."""

    def __init__(self, switch: Switch, spec: PortSpec, run_dir: Path) -> None:
        self.ident = DeviceId(0, "uplink", 0, 0, "")  # nobody's in the store
        self.switch, self.spec = switch, spec
        self._run_dir = run_dir
        self._lock = threading.Lock()
        self._outer: OuterPort | None = None
        self._open: set[str] = set()
        self._joined: set[str] = set()
        self._lost = False  # and the log has heard of it

    def open(self, vif: str) -> None:
        """A vif is advertised. Raises PlatformError, ConfigError."""
        with self._lock:
            if self._outer is None:
                mtu = self.spec.mtu or (0 if self.spec.kind == "packet" else DEFAULT_MTU)
                # Without a claim: in an upgrade it is of both processes, until the last vif has gone over.
                self._outer = OuterPort(self.spec, mtu, f"uplink-{self.switch.name}", self._run_dir)
            else:
                self._outer.renew()
            self._lost = False
            self._open.add(vif)

    def join(self, vif: str) -> None:
        """It is connected. Raises as open() does."""
        with self._lock:
            if self._outer is not None:
                queues = min(max(QUEUES, len(self.switch.shards)), MAX_QUEUES)
                self._outer.attach(self.switch, queues, ACCEPTS_ALL, self)
                self._lost = False
            self._joined.add(vif)

    def leave(self, vif: str) -> None:
        """It is connected no more. Harmless a second time."""
        with self._lock:
            self._joined.discard(vif)
            if not self._joined and self._outer is not None:
                self._outer.detach()

    def close(self, vif: str) -> None:
        """It is gone, or the next process's. A TAP stays. Harmless a second time."""
        self.leave(vif)
        with self._lock:
            self._open.discard(vif)
            if not self._open and self._outer is not None:
                self._outer.close()
                self._outer = None

    def port_lost(self, error: int) -> str:
        """What is behind is gone: in words. The log hears of it once."""
        outer = self._outer  # the last vif may go meanwhile
        text = "" if outer is None else outer.lost(error)
        if not self._lost:
            log.error("uplink of switch %s: %s; SIGHUP has it made again", self.switch.name, text)
        self._lost = True
        return text

    def make_again(self) -> None:
        """If it is gone. Raises as open() does."""
        with self._lock:
            if self._outer is not None:
                self._outer.renew()
                self._lost = False
