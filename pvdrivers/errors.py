"""Whose fault it was decides what happens next.

A bad request becomes a status on the ring and never an exception. A ring or a handshake that no honest peer would
produce is a ProtocolViolation: that one device closes, every other goes on. Everything else is ours or the host's.
"""

from __future__ import annotations


class PvError(Exception):
    """Base of all errors that a user should read: what, where, which limit, and what to do next."""


class ConfigError(PvError):
    """A URI, an option or a key written by the operator or the toolstack makes no sense."""


class PlatformError(PvError):
    """The hypervisor (embedded or real) refused, or is not there."""


class UnavailableError(PlatformError):
    """This host lacks what it takes, or keeps it from us: only its operator can change that."""


class StoreError(PvError):
    """What a disk is made of is missing, locked, too small or broken."""


class DeviceBusyError(PvError):
    """The device, its backing store or its run directory is already served by another process."""


class LeftInUse(BaseException):
    """A ring's worker has ended, and what the ring had under way may land for as long as the process lives: its device
    stays as it is, with all that it has open. Not an Exception: nobody is to go on from here with letting go."""


class GuestError(PvError):
    """What the guest's keys name does not work: held against it, and tried again, later and later."""


class ProtocolViolation(PvError):
    """The other end of a device broke the protocol. Names domain, device and violation."""

    def __init__(self, domid: int, device: str, violation: str) -> None:
        super().__init__(f"domain {domid}, device {device}: {violation}; the device is closed, others go on")
        self.domid = domid
        self.device = device
        self.violation = violation
