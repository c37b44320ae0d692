"""What a driver domain's quota in xenstore does not let us do: watch, publish. It is told of, and done later."""

from __future__ import annotations

import errno
import time

import pytest

from pvdrivers import finder as finder_module
from pvdrivers import pace as pace_module
from pvdrivers.xenbus import XenbusState as S
from pvdrivers.xenstore import XenStoreError
from tests.device.yard import DriverDomain, Yard, connect, until
from tests.xenstore.device import XenbusDevice


def test_no_watch_is_left(yard: Yard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain may have 128 watches: frontends beyond that are looked at all the same."""
    monkeypatch.setattr(finder_module, "POLL_SECONDS", 0.05)
    dd = DriverDomain(yard)
    yard.served.call(lambda: setattr(yard.served.server.quotas, "watches", 2))
    for devid in (51728, 51744):
        dd.attach(devid)
    daemon = yard.daemon(domid=3, connect=dd.connect)
    until(lambda: len(daemon.disks) == 3 and all(life.state == S.InitWait for life in daemon.host.lives.values()))
    assert daemon.host.finder.unwatched
    assert "looked at every second" in str(daemon.host.stats())
    assert caplog.text.count("no watch is left") == 1 and "quota-maxwatch" in caplog.text
    for devid in (51712, 51728, 51744):
        dd.front = f"/local/domain/5/device/vbd/{devid}"
        dd.publish()
    until(lambda: all(life.connected for life in daemon.host.lives.values()))
    yard.served.call(lambda: setattr(yard.served.server.quotas, "watches", 128))
    until(lambda: not daemon.host.finder.unwatched)
    until(lambda: not any("unwatched" in row["troubles"] for row in daemon.host.stats().values()))
    assert caplog.text.count("no watch is left") == 1


def test_no_watch_is_left_on_the_kernels_device(
    yard: Yard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through /dev/xen/xenbus, which a driver domain has: a refused WATCH is an error of write(2)."""
    monkeypatch.setattr(finder_module, "POLL_SECONDS", 0.05)
    dd = DriverDomain(yard)
    dd.attach(51728)
    device = XenbusDevice(yard.served, 3, yard.stack, monkeypatch)
    device.watches, device.refusal = 2, errno.E2BIG
    daemon = yard.daemon(domid=3, connect=device.connect)
    until(lambda: len(daemon.disks) == 2 and all(life.state == S.InitWait for life in daemon.host.lives.values()))
    assert caplog.text.count("no watch is left") == 1 and "is lost" not in caplog.text
    for devid in (51712, 51728):
        dd.front = f"/local/domain/5/device/vbd/{devid}"
        dd.publish()
    until(lambda: all(life.connected for life in daemon.host.lives.values()))
    device.watches = 128
    until(lambda: not daemon.host.finder.unwatched)
    until(lambda: not any("unwatched" in row["troubles"] for row in daemon.host.stats().values()))


def test_a_watch_that_is_refused(yard: Yard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """For whatever else: the device is served, by looking at it, until the watch is to be had."""
    monkeypatch.setattr(finder_module, "POLL_SECONDS", 0.05)
    daemon = yard.daemon()
    watch, refused = daemon.platform.store.watch, [True]

    def refuses(path: str, token: str) -> None:
        if refused and token.startswith("front "):
            raise XenStoreError(errno.EACCES, "WATCH", path)
        watch(path, token)

    monkeypatch.setattr(daemon.platform.store, "watch", refuses)
    connect(yard.guest(5))
    key = ("vbd", 5, 51712)
    until(lambda: daemon.host.lives[key].connected)
    assert daemon.host.finder.refused == {} and key in daemon.host.finder.unwatched
    said = daemon.host.stats()["vbd-5-51712"]["troubles"]["unwatched"]
    assert "cannot be watched" in said and "EACCES" in said
    refused.clear()
    until(lambda: not daemon.host.finder.unwatched)
    until(lambda: daemon.host.lives[key].troubles.now == {})
    assert caplog.text.count("cannot be watched") == 1


def test_no_node_is_left(yard: Yard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain may own 1000 nodes: what cannot be published is tried again ever more rarely, and told of."""
    monkeypatch.setattr(pace_module, "RETRY_SECONDS", (0.05, 2.0))
    dd = DriverDomain(yard)
    nodes = yard.served.server.quotas.nodes
    yard.served.call(lambda: setattr(yard.served.server.quotas, "nodes", 0))
    daemon = yard.daemon(domid=3, connect=dd.connect)
    key = ("vbd", 5, 51712)
    until(lambda: key in daemon.host.lives and "quota" in daemon.host.lives[key].troubles.now)
    time.sleep(1.5)
    disk = daemon.disks["vbd-5-51712"]
    assert 3 <= disk.calls.count("advertise") <= 7, "at 0.05, 0.1, 0.2, 0.4, 0.8 s, and not all the time"
    assert "ENOSPC" in daemon.host.stats()["vbd-5-51712"]["troubles"]["quota"]
    assert sum("ENOSPC" in r.message for r in caplog.records if r.levelname == "ERROR") == 1, caplog.text
    yard.served.call(lambda: setattr(yard.served.server.quotas, "nodes", nodes))
    until(lambda: dd.state() == S.InitWait)
    until(lambda: "quota" not in daemon.host.lives[key].troubles.now)
    dd.publish()
    until(lambda: daemon.host.lives[key].connected)
