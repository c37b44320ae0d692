"""What a vif has on its other side: opened, attached, found gone, made again. Of a switch it is the uplink."""

from __future__ import annotations

from pathlib import PurePath

from pvdrivers.device import BackKeys, Context
from pvdrivers.ethernet import LEAST_MTU, MOST_MTU
from pvdrivers.worker.pool import WorkerPool

from .outer import OuterPort
from .port import PortSpec
from .switch import Switch, find_switch
from .uplinks import Uplink, uplinks_of

DEFAULT_MTU = 1500


class OtherSide:
    """The other side of one vif. If it leads out nowhere, nothing here does anything."""

    def __init__(self, owner: str, context: Context) -> None:
        self._owner, self._context = owner, context
        self._uplink: Uplink | None = None
        self._outer: OuterPort | None = None
        self._asked: tuple[PortSpec, int, bool] | None = None

    def open(self, spec: PortSpec, params: BackKeys) -> None:
        """As the backend directory says. PlatformError, ConfigError: what cannot be had, and why."""
        asked = None
        if spec.kind in ("tap", "bridge", "packet"):
            mtu = params.int_key("mtu", DEFAULT_MTU, LEAST_MTU, MOST_MTU)
            script = PurePath(params.str_key("script", "")).name
            # Of another script of the toolstack's a bridge's name may mean anything, or nothing.
            asked = (spec, mtu, spec.kind == "tap" or script in ("", "vif-bridge"))
        if self._outer is not None and asked != self._asked:
            self.close(delete=True)
        self._asked = asked
        if self._outer is not None:
            self._outer.renew()
        elif asked is not None:
            spec, mtu, needs_bridge = asked
            self._outer = OuterPort(
                spec, mtu, self._owner, self._context.run_dir, needs_bridge=needs_bridge, claim=True
            )
        uplink = self._find_uplink(spec) if spec.kind == "switch" else None
        if self._uplink is not None and self._uplink is not uplink:
            self._uplink.close(self._owner)
        self._uplink = uplink
        if uplink is not None:
            uplink.open(self._owner)

    def _find_uplink(self, spec: PortSpec) -> Uplink | None:
        wanted = uplinks_of(self._context.options).get(spec.name)
        if wanted is None:
            return None
        pool = self._context.workers
        assert isinstance(pool, WorkerPool)
        switch = find_switch(pool, spec.name)
        if switch.uplink is None:
            switch.uplink = Uplink(switch, wanted, self._context.run_dir)
        uplink: Uplink = switch.uplink
        return uplink

    def attach(self, switch: Switch, queues: int, accepts: int, device: object) -> None:
        """The vif has joined a switch with so many queues: what is behind it does, too."""
        if self._outer is not None:
            self._outer.attach(switch, queues, accepts, device)
        if self._uplink is not None:
            self._uplink.join(self._owner)

    def detach(self) -> None:
        """Harmless a second time."""
        if self._outer is not None:
            self._outer.detach()
        if self._uplink is not None:
            self._uplink.leave(self._owner)

    def gone(self, error: int) -> str:
        """What was there is not there any more: in words."""
        return "" if self._outer is None else self._outer.lost(error)

    def make_again(self) -> None:
        """If it is gone. Raises as open() does."""
        if self._uplink is not None:
            self._uplink.make_again()
        if self._outer is not None:
            self._outer.renew()

    def close(self, *, delete: bool = False) -> None:
        """Let go of it; with `delete` what was made for it is no more. Harmless a second time."""
        if self._outer is not None:
            self._outer.close(delete=delete)
            self._outer = None
        if self._uplink is not None:
            self._uplink.close(self._owner)
            self._uplink = None
