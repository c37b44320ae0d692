"""What a vif has on its other side: opened, attached, found gone, made again. Of a switch it is the uplink."""

from __future__ import annotations

from functools import partial
from pathlib import PurePath

from pvdrivers.device import BackKeys, Context
from pvdrivers.errors import DeviceBusyError, PlatformError, PvError
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

    @property
    def lost(self) -> bool:
        """What was there is gone, and has not been made again."""
        return self._outer is not None and self._outer.is_lost

    def open(self, spec: PortSpec, mtu: int, params: BackKeys, *, served: bool = False) -> None:
        """As the backend directory says, for packets of `mtu`, 0: none is named. PlatformError, ConfigError: what
        cannot be had, and why. For a guest that is `served` already an MTU that does not fit is had all the same, and
        look_again() says so."""
        asked = None
        if spec.kind in ("tap", "bridge", "packet"):
            script = PurePath(params.str_key("script", "")).name
            # Of another script of the toolstack's a bridge's name may mean anything, or nothing.
            asked = (spec, mtu or DEFAULT_MTU, spec.kind == "tap" or script in ("", "vif-bridge"))
        if self._outer is not None and asked != self._asked:
            self.close(delete=True)
        self._asked = asked
        if self._outer is not None:
            self._outer.renew(strict=not served)
        elif asked is not None:
            spec, mtu, needs_bridge = asked
            self._outer = OuterPort(
                spec, mtu, self._owner, self._context.run_dir, needs_bridge=needs_bridge, claim=True, strict=not served
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
            self._outer.attach(switch, queues, accepts, device, strict=False)
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

    def look_again(self, mtu: int) -> list[str]:
        """While its vif is connected: what is gone is made again, and has the MTU that the vif has by now. What of that
        cannot be had."""
        errors = []
        for call in (self._make_again, partial(self._fit, mtu or DEFAULT_MTU)):
            try:
                call()
            except (PlatformError, DeviceBusyError) as e:  # to a vif that is not connected this passes by itself
                errors.append(f"{e}; SIGHUP, or any key written to the backend directory, has it tried again")
            except (PvError, OSError) as e:
                errors.append(str(e))
        return errors

    def _make_again(self) -> None:
        if self._uplink is not None:
            self._uplink.make_again()
        if self._outer is not None:
            self._outer.renew(strict=False)

    def _fit(self, mtu: int) -> None:
        # Not asked of the kernel each time: a guest has a part in how often this is looked at.
        if self._asked is None or self._outer is None or self.lost or (self._outer.fits and self._outer.mtu == mtu):
            return
        self._asked = (self._asked[0], mtu, self._asked[2])
        self._outer.fit(mtu)

    def close(self, *, delete: bool = False) -> None:
        """Let go of it; with `delete` what was made for it is no more. Harmless a second time."""
        if self._outer is not None:
            self._outer.close(delete=delete)
            self._outer = None
        if self._uplink is not None:
            self._uplink.close(self._owner)
            self._uplink = None
