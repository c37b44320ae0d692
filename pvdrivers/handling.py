"""A device in other threads' hands: what its life has done to it that may take long. One call at a time."""

from __future__ import annotations

import logging

from .control import Control
from .device import Device, FrontKeys, Publish

log = logging.getLogger("pvdrivers.device")


class Handling:
    """What is done to one device, and whether it is connected by it."""

    def __init__(self, device: Device, control: Control) -> None:
        self.connected = False
        """connect() has succeeded, and the rings are in use."""
        self._device = device
        self._control = control

    def advertise(self) -> Publish:
        """Drop a connection if there is one; open what is needed. Raises what Device.advertise() does."""
        self.disconnect()
        return self._device.advertise()

    def connect(self, recover: bool) -> Publish:
        """A new connection, or that of a process that died. Raises what FrontKeys.read() and Device.connect() do."""
        # Here, and not on the control thread: how long it takes is the guest's to say.
        front = FrontKeys.read(self._control.store, self._device.ident)
        self.disconnect()
        if recover:
            self._device.reopen()
        keys = self._device.connect(front, recover=recover)
        self.connected = True
        return keys

    def disconnect(self) -> None:
        """Drop the connection if there is one."""
        if self.connected:
            self.connected = False
            try:
                self._device.disconnect()
            except Exception:
                log.exception("%s: while disconnecting", self._device.ident)

    def remove(self) -> None:
        """Let go of everything."""
        self.disconnect()
        try:
            self._device.removed()
        except Exception:
            log.exception("%s: while being removed", self._device.ident)
