"""Requests about domains, and to xenstored itself: a part of the client (pvdrivers.xenstore)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from . import xs_wire as wire


class DomainRequests(ABC):
    """What dom0 and toolstacks ask beside nodes and watches."""

    @abstractmethod
    def _talk(self, type_: int, payload: bytes, path: str = "", tx: int = 0) -> bytes:
        """One request and its reply. Raises XenStoreError."""

    def introduce(self, domid: int, gfn: int, port: int) -> None:
        """Tells xenstored to serve a domain: its ring's frame number and event channel (dom0 only)."""
        self._talk(wire.XS_INTRODUCE, b"%d\0%d\0%d\0" % (domid, gfn, port), str(domid))

    def release(self, domid: int) -> None:
        """Ends xenstored's service to a domain and removes what it owns (dom0 only)."""
        self._talk(wire.XS_RELEASE, b"%d\0" % domid, str(domid))

    def resume(self, domid: int) -> None:
        """A domain that was shut down runs again (dom0 only)."""
        self._talk(wire.XS_RESUME, b"%d\0" % domid, str(domid))

    def is_introduced(self, domid: int) -> bool:
        """Whether xenstored serves the domain (dom0 only)."""
        return self._talk(wire.XS_IS_DOMAIN_INTRODUCED, b"%d\0" % domid, str(domid)) == b"T\0"

    def get_domain_path(self, domid: int) -> str:
        """Where a domain's own nodes are, "/local/domain/<domid>"."""
        return self._talk(wire.XS_GET_DOMAIN_PATH, b"%d\0" % domid, str(domid)).rstrip(b"\0").decode()

    def set_target(self, domid: int, target: int) -> None:
        """Gives `domid` (a device model's domain) all rights of `target` (dom0 only)."""
        self._talk(wire.XS_SET_TARGET, b"%d\0%d\0" % (domid, target), str(domid))

    def control(self, *words: str) -> str:
        """A CONTROL command and its parameters, such as ("quota", "set", "nodes", "500"); the answer's text."""
        payload = b"".join(word.encode() + b"\0" for word in words)
        return self._talk(wire.XS_CONTROL, payload, " ".join(words)).rstrip(b"\0").decode(errors="replace")
