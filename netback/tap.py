"""A TAP of this host's kernel: made, found again, and its queues (Linux, Documentation/networking/tuntap.rst).

It stays when the process ends, with its bridge and its addresses, and the next process finds it by its name; it goes
when the vif is detached, if it was we who made it: the alias says so (`ip link`).
"""

from __future__ import annotations

import errno
import fcntl
import os
from functools import partial

from pvdrivers.errors import ConfigError, PlatformError, PvError
from pvdrivers.interfaces import TSO4, TSO6, TUN_CSUM, TUN_DEVICE, open_tun, set_tap_carrier, set_tap_offload, take_tap

from .links import Links, find_bridge, fit_tap, in_namespace, set_up_tap
from .port import PortSpec
from .records import ACCEPTS_GSO4, ACCEPTS_GSO6

_TUNSETPERSIST, _TUNGETIFF = 0x400454CB, 0x800454D2


class Tap:
    """A TAP, up, without a carrier until there is somebody behind it. `fds` are those of its queues."""

    def __init__(self, spec: PortSpec, mtu: int, owner: str, *, needs_bridge: bool = True, strict: bool = True) -> None:
        """Make it, or find it again. PlatformError, ConfigError: what cannot be had, and why; if `strict`, an MTU that
        its bridge does not have."""
        self.spec, self.what = spec, f"TAP {spec.name}"
        self.fds: list[int] = []
        self._ours = False
        in_namespace(spec.netns, partial(self._make, mtu, f"pvdrivers {owner}", needs_bridge, strict))

    def _make(self, mtu: int, owner: str, needs_bridge: bool, strict: bool) -> None:
        with Links() as links:
            index = links.index(self.spec.name)
            before = links.facts(index) if index else None
            if self.spec.bridge:
                find_bridge(links, self.what, self.spec, needs_bridge)  # or all is made and taken away at each try
        self._ours = before is None or before["alias"].startswith("pvdrivers ")
        self.fds.append(self._open(found=before is not None))
        try:
            self.carrier(False)
            set_up_tap(self.spec, mtu, owner if self._ours else before["alias"] if before else "",
                       needs_bridge=needs_bridge, strict=strict)  # fmt: skip
            fcntl.ioctl(self.fds[0], _TUNSETPERSIST, 1)
        except BaseException as e:
            self.close()
            if isinstance(e, OSError):
                raise PlatformError(f"{self.what}: {e.strerror}") from e
            raise

    def _open(self, *, found: bool) -> int:
        """A queue more. In the namespace of this thread."""
        try:
            fd = open_tun()
        except OSError as e:
            hint = "load the module tun" if e.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO) else "it takes root"
            raise PlatformError(f"{self.what}: {TUN_DEVICE} cannot be opened: {e.strerror}; {hint}") from e
        try:
            take_tap(fd, self.spec.name, several=True)
        except OSError as e:
            os.close(fd)
            raise self._refused(e, found) from e
        return fd

    def _refused(self, error: OSError, found: bool) -> PvError:
        if error.errno in (errno.EPERM, errno.EACCES):
            return PlatformError(f"{self.what}: {error.strerror}; it takes CAP_NET_ADMIN to make one")
        if found and error.errno in (errno.EINVAL, errno.EBUSY):
            return ConfigError(
                f"{self.what}: there is an interface of that name, which is no TAP of several queues that takes headers"
                f" (ip tuntap add dev {self.spec.name} mode tap multi_queue vnet_hdr); name another"
            )
        if error.errno in (errno.E2BIG, errno.EBUSY):
            return PlatformError(f"{self.what}: another process has all of its queues")
        return PlatformError(f"{self.what}: it cannot be made: {error.strerror}")

    def is_there(self) -> bool:
        """Whether our queues are those of a TAP yet: one that was deleted and made again is another."""
        try:
            fcntl.ioctl(self.fds[0], _TUNGETIFF, bytes(40))
        except (IndexError, OSError):
            return False
        return True

    def open_queues(self, count: int, accepts: int) -> list[int]:
        """Have so many queues, which take what a receiver of `accepts` takes. Their descriptors, non-blocking."""
        while len(self.fds) < count:
            self.fds.append(in_namespace(self.spec.netns, partial(self._open, found=True)))
        # A blank checksum is completed for who does not take it; segments nobody makes.
        offload = TUN_CSUM
        offload |= TSO4 if accepts & ACCEPTS_GSO4 else 0
        offload |= TSO6 if accepts & ACCEPTS_GSO6 else 0
        try:
            set_tap_offload(self.fds[0], offload)
        except OSError as e:
            raise PlatformError(f"{self.what}: offloads {offload:#x}: {e.strerror}") from e
        self.carrier(True)
        return self.fds[:count]

    def fit(self, mtu: int) -> None:
        """Its MTU is this from now on. PlatformError; ConfigError: it is, but does not fit its bridge."""
        in_namespace(self.spec.netns, partial(fit_tap, self.spec, mtu))

    def close_queues(self) -> None:
        """All but one: nobody is behind it."""
        self.carrier(False)
        for fd in self.fds[1:]:
            os.close(fd)
        del self.fds[1:]

    def carrier(self, on: bool) -> None:
        """What its host sees of it: a cable, or none. Not told before Linux 5.0, and not if it is gone."""
        if self.fds:
            try:
                set_tap_carrier(self.fds[0], on)
            except OSError:
                pass

    def close(self, *, delete: bool = False) -> None:
        """Let go of it; with `delete` it is no more, if we had made it. Harmless a second time."""
        for fd in self.fds:
            if delete and self._ours:
                try:
                    fcntl.ioctl(fd, _TUNSETPERSIST, 0)
                except OSError:
                    pass  # it is gone already
                delete = False
            os.close(fd)
        self.fds = []
