"""A TAP of this host's kernel: made, found again, and its queues (Linux, Documentation/networking/tuntap.rst).

It stays when the process ends, with its bridge and its addresses, and the next process finds it by its name; it goes
when the vif is detached, if it was we who made it: the alias says so (`ip link`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from functools import partial

from pvdrivers.errors import ConfigError, PlatformError, PvError

from .links import Links, find_bridge, in_namespace, set_up_tap
from .port import PortSpec
from .records import ACCEPTS_GSO4, ACCEPTS_GSO6

_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_TUNSETPERSIST, _TUNSETOFFLOAD, _TUNSETCARRIER = 0x400454CB, 0x400454D0, 0x400454E2
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x100, 0x1000, 0x4000
_FLAGS = _IFF_TAP | _IFF_MULTI_QUEUE | _IFF_NO_PI | _IFF_VNET_HDR
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 1, 2, 4
_DEVICE = "/dev/net/tun"


class Tap:
    """A TAP, up, without a carrier until there is somebody behind it. `fds` are those of its queues."""

    def __init__(self, spec: PortSpec, mtu: int, owner: str, *, needs_bridge: bool = True) -> None:
        """Make it, or find it again. PlatformError, ConfigError: what cannot be had, and why."""
        self.spec, self.what = spec, f"TAP {spec.name}"
        self.fds: list[int] = []
        self._ours = False
        in_namespace(spec.netns, partial(self._make, mtu, f"pvdrivers {owner}", needs_bridge))

    def _make(self, mtu: int, owner: str, needs_bridge: bool) -> None:
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
                       needs_bridge=needs_bridge)  # fmt: skip
            fcntl.ioctl(self.fds[0], _TUNSETPERSIST, 1)
        except BaseException as e:
            self.close()
            if isinstance(e, OSError):
                raise PlatformError(f"{self.what}: {e.strerror}") from e
            raise

    def _open(self, *, found: bool) -> int:
        """A queue more. In the namespace of this thread."""
        try:
            fd = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            hint = "load the module tun" if e.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO) else "it takes root"
            raise PlatformError(f"{self.what}: {_DEVICE} cannot be opened: {e.strerror}; {hint}") from e
        try:
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", self.spec.name.encode(), _FLAGS))
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

    def open_queues(self, count: int, accepts: int) -> list[int]:
        """Have so many queues, which take what a receiver of `accepts` takes. Their descriptors, non-blocking."""
        while len(self.fds) < count:
            self.fds.append(in_namespace(self.spec.netns, partial(self._open, found=True)))
        # A blank checksum is completed for who does not take it; segments nobody makes.
        offload = _TUN_F_CSUM
        offload |= _TUN_F_TSO4 if accepts & ACCEPTS_GSO4 else 0
        offload |= _TUN_F_TSO6 if accepts & ACCEPTS_GSO6 else 0
        try:
            fcntl.ioctl(self.fds[0], _TUNSETOFFLOAD, offload)
        except OSError as e:
            raise PlatformError(f"{self.what}: offloads {offload:#x}: {e.strerror}") from e
        self.carrier(True)
        return self.fds[:count]

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
                fcntl.ioctl(self.fds[0], _TUNSETCARRIER, struct.pack("i", on))
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
