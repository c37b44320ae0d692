"""A port that leads out of the process: a TAP or a packet socket, and its queues as rings of a switch's workers.

    open      when the vif is advertised: the TAP is there before its guest is
    attach    when the vif connects: as many queues as it has
    renew     what is behind may have gone: under traffic, of which lost() hears, or while nobody was looking
    detach    and the TAP has no carrier any more
    close     the process ends: a TAP stays, for the next one
    remove    the vif is gone, and so is what was made for it
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from pvdrivers.claims import lock
from pvdrivers.errors import ConfigError
from pvdrivers.stats import StatsFile
from pvdrivers.worker.control import RingHandle
from rings.jit import address_of

from . import port_in
from .packet_socket import PacketSocket
from .port import PortSpec
from .records import ACCEPTS_ALL, KIND_NAMES, PORT_OUTER
from .switch import Port, Switch
from .tap import Tap

_taken: dict[tuple[str, str, str], OuterPort] = {}
_taken_lock = threading.Lock()


class OuterPort:
    """One such port. `owner` is the name of whoever has it: a vif, or an uplink."""

    def __init__(
        self, spec: PortSpec, mtu: int, owner: str, run_dir: Path, *,
        needs_bridge: bool = True, claim: bool = False, strict: bool = True,
    ) -> None:  # fmt: skip
        """Open it. PlatformError, ConfigError: what cannot be had, and why; if `strict`, an MTU that does not fit. With
        `claim` a TAP is of no other process meanwhile, else DeviceBusyError."""
        self.spec, self.mtu, self.owner = spec, mtu, owner
        self._needs_bridge = needs_bridge
        self.port = Port(f"{owner}: {spec}", vlan=spec.vlan, trunk=spec.trunk)
        self.switch: Switch | None = None
        self._stats = run_dir / "stats"
        self._counters: StatsFile | None = None
        self._handles: list[RingHandle] = []
        self._wanted: tuple[Switch, int, int, Any] | None = None
        self._lost = False
        self.fits = strict
        """So much is known of `mtu`, and of what it is behind."""
        self._key = ("packet" if spec.kind == "packet" else "tap", spec.netns, spec.name)
        with _taken_lock:
            other = _taken.get(self._key)
            if other is not None and spec.kind != "packet":
                raise ConfigError(f"TAP {spec.name} is that of {other.owner} already; name another")
            _taken[self._key] = self
        self._claim = -1
        try:
            if claim and spec.kind != "packet":
                self._claim = _claim(spec, run_dir)
            self.behind = self._open(strict)
        except BaseException:
            self._free()
            raise

    def _open(self, strict: bool) -> Tap | PacketSocket:
        if self.spec.kind == "packet":
            return PacketSocket(self.spec, self.mtu, strict=strict)
        return Tap(self.spec, self.mtu, self.owner, needs_bridge=self._needs_bridge, strict=strict)

    def _free(self) -> None:
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1
        with _taken_lock:
            if _taken.get(self._key) is self:
                del _taken[self._key]

    def attach(self, switch: Switch, queues: int, accepts: int, device: Any, *, strict: bool = True) -> None:
        """Join a switch with so many queues, for receivers of `accepts`. `device` is told if what is behind goes."""
        self._wanted = (switch, queues, accepts, device)
        self.renew(strict=strict)

    @property
    def is_lost(self) -> bool:
        """What was behind is gone, and renew() has not brought it back."""
        return self._lost or (self._wanted is not None and self.switch is None)

    def renew(self, *, strict: bool = True) -> None:
        """Have it there: opened anew if it has gone, and attached if it was. Raises as opening it does, and may be
        called again then. Nothing is deleted: an operator may have given it an address, or to Open vSwitch."""
        if self._lost or not self.behind.is_there():
            fresh = self._open(strict)  # before the other is let go of: if there is none, what it loses is counted yet
            self._detach()
            self.behind.close()
            self.behind, self._lost, self.fits = fresh, False, strict
        if self._wanted is not None and self.switch is None:
            self.switch, queues, accepts, device = self._wanted
            try:
                self._attach(self.switch, self.behind.open_queues(queues, accepts), device)
            except BaseException:
                self._detach()
                raise

    def _attach(self, switch: Switch, fds: list[int], device: Any) -> None:
        queues = len(fds)
        about = {
            "device": f"{self.owner}.port",
            "domid": -1,
            "uri": str(self.spec),
            "policy": "copy",
            "kinds": KIND_NAMES,
        }
        self._counters = StatsFile(self._stats / f"{self.owner}.port", about, queues)
        row = self.port.record[0]
        row["kind"], row["domid"], row["accepts"], row["n_out"] = PORT_OUTER, -1, ACCEPTS_ALL, 0
        switch.settle(self.port, queues)
        switch.join(self.port)
        for q, fd in enumerate(fds):
            shard = switch.shard_of(self.port, q)
            handle = shard.worker.new_ring(device, -1)
            self._handles.append(handle)
            ring = handle.record
            ring["event_fd"], ring["device"], ring["stats"] = fd, self.port.address, self._counters.address(q)
            ring["step"], ring["finish"] = address_of(port_in.step_port), address_of(port_in.finish_port)
            ring["local"] = shard.address
            ring["blocked"] = 1  # there is no ring to be looked at
            if isinstance(self.behind, PacketSocket):
                ring["priv"] = self.behind.messages[q].ctypes.data
            row["out"][q] = handle.address
        for handle in self._handles:
            handle.worker.attach(handle)
        row["n_out"] = queues

    def detach(self) -> None:
        """Leave the switch. Harmless a second time."""
        self._wanted = None
        self._detach()

    def _detach(self) -> None:
        if self.switch is None:
            return
        self.port.record[0]["n_out"] = 0
        self.switch.leave(self.port)
        for handle in self._handles:
            handle.worker.detach(handle)
        self._handles = []
        self.switch = None
        self.behind.close_queues()
        if self._counters is not None:
            self._counters.remove()
            self._counters = None

    def close(self, *, delete: bool = False) -> None:
        """Let go; with `delete` a TAP that was made for it is no more. Harmless a second time."""
        self.detach()
        self.behind.close(delete=delete)
        self._free()

    def fit(self, mtu: int) -> None:
        """Its MTU is this from now on. PlatformError; ConfigError: it is, but does not fit what is behind."""
        self.mtu, self.fits = mtu, False
        self.behind.fit(mtu)
        self.fits = True

    def lost(self, error: int) -> str:
        """What was behind is gone, by this errno: in words."""
        self._lost = True
        why = os.strerror(error)
        return f"{self.behind.what}: it is gone ({why}); what is to leave by it is lost until it is there again"


def _claim(spec: PortSpec, run_dir: Path) -> int:
    tap = f"TAP {spec.name}"
    path = run_dir / "claims" / f"tap:{spec.netns}:{spec.name}.lock"
    return lock(path, tap, f"{tap} is that of", "name another")
