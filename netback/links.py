"""Interfaces, bridges and network namespaces, by netlink (pyroute2). The only file that imports it, and only when it is
needed: what it raises comes out as PlatformError, or as ConfigError where a number of the toolstack's is at fault.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from pvdrivers.errors import ConfigError, PlatformError, PvError

from .port import PortSpec

T = TypeVar("T")

MAC_OF_A_PORT = "fe:ff:ff:ff:ff:ff"
"""What Linux's netback gives to an interface on a bridge: no bridge takes it for its own, and no guest has it."""


def in_namespace(name: str, call: Callable[[], T]) -> T:
    """Call in a network namespace, "": our own; in a thread of its own, as a thread is in one namespace for all that it
    does. PlatformError if there is none of the name."""
    if not name:
        return call()
    from pyroute2 import netns

    results: list[T] = []
    errors: list[BaseException] = []

    def main() -> None:
        try:
            netns.setns(name, flags=0)
        except OSError as e:
            errors.append(PlatformError(_no_namespace(name, e)))
            return
        try:
            results.append(call())
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=main, name=f"netns-{name}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _no_namespace(name: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"network namespace {name}: there is none of that name; `ip netns add {name}` makes one"
    return f"network namespace {name}: {os.strerror(error.errno or 0)}; it takes CAP_SYS_ADMIN to enter one"


def what_netlink_says(what: str, error: Any) -> PvError:
    """NetlinkError -> ours."""
    code = int(getattr(error, "code", 0) or 0)
    text = f"{what}: {os.strerror(code)}"
    if code in (errno.EPERM, errno.EACCES):
        text += "; it takes CAP_NET_ADMIN"
    return PlatformError(text)


class Links:
    """Netlink in the namespace of this thread; a context manager."""

    def __init__(self) -> None:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        self._error = NetlinkError
        self._route: Any = IPRoute()

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *_: object) -> None:
        self._route.close()

    def index(self, name: str) -> int:
        """The number of an interface, 0 if there is none of the name."""
        found = self._route.link_lookup(ifname=name)
        return int(found[0]) if found else 0

    def facts(self, index: int) -> dict[str, Any]:
        """Of an interface: kind ("" if it is hardware), mtu, master, alias, mac. PlatformError if it is gone."""
        try:
            link = self._route.link("get", index=index)[0]
        except self._error as e:
            raise what_netlink_says(f"interface {index}", e) from e
        info = link.get("linkinfo")
        return {
            "kind": (info.get("kind") if info is not None else "") or "",
            "mtu": int(link.get("mtu") or 0),
            "master": int(link.get("master") or 0),
            "alias": link.get("ifalias") or "",
            "mac": link.get("address") or "",
        }

    def set(self, what: str, index: int, **keys: Any) -> None:
        """Set what `ip link set` does. Raises PvError that begins with `what`."""
        try:
            self._route.link("set", index=index, **keys)
        except self._error as e:
            raise what_netlink_says(what, e) from e

    def add_address(self, what: str, index: int, address: str) -> None:
        """One that is there already is no error."""
        ip, _, length = address.partition("/")
        try:
            self._route.addr("add", index=index, address=ip, prefixlen=int(length))
        except self._error as e:
            if e.code != errno.EEXIST:
                raise what_netlink_says(f"{what}: address {address}", e) from e


def set_up_tap(spec: PortSpec, mtu: int, owner: str, *, needs_bridge: bool, strict: bool) -> None:
    """A TAP that was made: its MTU, its bridge and its addresses; then up. In the namespace of this thread.

    `owner` is noted with it (ip link: alias). Without `needs_bridge` a script of the toolstack's sees to a bridge that
    is not there, or is none of Linux. Raises PlatformError, if `strict` ConfigError for an MTU that does not fit.
    """
    what = f"TAP {spec.name}"
    with Links() as links:
        index = links.index(spec.name)
        if not index:
            raise PlatformError(f"{what}: it was taken away while it was being set up")
        master = find_bridge(links, what, spec, needs_bridge) if spec.bridge else 0
        facts = links.facts(index)
        keys: dict[str, Any] = {"ifalias": owner}
        if facts["mtu"] != mtu:
            keys["mtu"] = mtu
        if spec.bridge and facts["mac"] != MAC_OF_A_PORT:
            keys["address"] = MAC_OF_A_PORT
        links.set(what, index, **keys)
        if master and facts["master"] != master:
            links.set(f"{what}: to be put on bridge {spec.bridge}", index, master=master)
        if master and strict:  # only now: a bridge's own follows its ports'
            _fit_bridge(links, what, spec, master, mtu)
        for address in spec.ips:
            links.add_address(what, index, address)
        links.set(what, index, state="up")


def fit_tap(spec: PortSpec, mtu: int) -> None:
    """A TAP that is there has this MTU from now on. In the namespace of this thread. PlatformError; ConfigError: its
    bridge has less."""
    what = f"TAP {spec.name}"
    with Links() as links:
        index = links.index(spec.name)
        if not index:
            raise PlatformError(f"{what}: it is gone, and cannot have an MTU of {mtu}")
        links.set(what, index, mtu=mtu)
        if spec.bridge and (master := links.facts(index)["master"]):
            _fit_bridge(links, what, spec, master, mtu)


def _fit_bridge(links: Links, what: str, spec: PortSpec, master: int, mtu: int) -> None:
    if mtu > (fits := links.facts(master)["mtu"]):
        raise ConfigError(
            f"{what}: an MTU of {mtu} does not fit bridge {spec.bridge}, which has {fits}: give the vif less"
            " (`mtu`), or the bridge and its other ports more"
        )


def find_bridge(links: Links, what: str, spec: PortSpec, needed: bool) -> int:
    """The number of the bridge, 0 if it is left to the toolstack's script."""
    index = links.index(spec.bridge)
    if not index:
        if not needed:
            return 0
        where = f" in network namespace {spec.netns}" if spec.netns else ""
        hint = f"`ip link add {spec.bridge} type bridge` makes one"
        raise PlatformError(f"{what}: bridge {spec.bridge} is not there{where}; {hint}")
    kind = links.facts(index)["kind"]
    if kind == "bridge":
        return index
    if needed and kind != "openvswitch":
        raise ConfigError(f"{what}: {spec.bridge} is an interface, but no bridge")
    if needed:
        hint = f"leave it out, and `ovs-vsctl add-port {spec.bridge} {spec.name}`"
        raise ConfigError(f"{what}: {spec.bridge} is Open vSwitch's, which has a database of its own: {hint}")
    return 0


def take_interface(what: str, name: str, mtu: int) -> int:
    """The number of an interface that is to be a port, and up. Raises PlatformError, ConfigError for the MTU."""
    with Links() as links:
        index = links.index(name)
        if not index:
            raise PlatformError(f"{what}: there is no interface {name}")
        facts = links.facts(index)
        if mtu > facts["mtu"]:
            raise ConfigError(
                f"{what}: an MTU of {mtu} does not fit {name}, which has {facts['mtu']}: give the vif less (`mtu`), or"
                " the interface more"
            )
        links.set(what, index, state="up")
        return index
