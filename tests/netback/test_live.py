"""What changes while a vif is connected: groups, link and MTU; and keys of the toolstack's that make no sense."""

from __future__ import annotations

import errno
import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from netback.groups import tidy
from netback.kept_file import KeptFile
from netback.multicast import amend, wants
from netback.params import parse_rate
from netback.records import GROUPS, MOST_GROUPS
from netback.switch import Port
from pvdrivers.frontends.netfront import CSUM_BLANK, Frame
from pvdrivers.frontends.netfront_keys import Wishes
from rings.jit import kernel
from rings.netif import (
    EXTRA_MCAST_ADD,
    EXTRA_MCAST_DEL,
    GSO_TCPV4,
    KEY_REQUEST_XDP_HEADROOM,
    RSP_ERROR,
    RSP_OKAY,
)

from .conftest import until
from .packets import tcp
from .test_hostile import logged
from .test_switch import EVERYBODY, nothing_came

A, B = b"\x01\0\x5e\0\0\1", b"\x33\x33\0\0\0\1"
_numbers = itertools.count()
daemon_serves = pytest.mark.jit_only("a real daemon serves")


@kernel
def _wants(porta: int, dst: int) -> bool:
    return wants(porta, dst)


def number(mac: bytes) -> int:
    return int.from_bytes(mac, "little")


def test_a_list_of_groups() -> None:
    port = Port("test")
    at, row = port.address, port.record[0]
    assert all(_wants(at, number(mac)) for mac in (A, EVERYBODY, b"\2other"))
    row["filters"] = 1
    assert [bool(_wants(at, number(mac))) for mac in (A, EVERYBODY, b"\2other")] == [False, True, True]
    for k in range(MOST_GROUPS):
        for _ in range(2):  # once more is no more
            assert amend(at, EXTRA_MCAST_ADD, number(A[:5] + bytes([k]))) == RSP_OKAY
    assert amend(at, EXTRA_MCAST_ADD, number(B)) == RSP_ERROR
    assert amend(at, EXTRA_MCAST_DEL, number(B)) == RSP_OKAY
    assert amend(at, EXTRA_MCAST_DEL, number(A[:5] + b"\7")) == RSP_OKAY
    assert amend(at, EXTRA_MCAST_ADD, number(b"\2other")) == RSP_ERROR
    assert amend(at, EXTRA_MCAST_ADD, number(B)) == RSP_OKAY
    listed = {A[:5] + bytes([k]) for k in range(MOST_GROUPS) if k != 7} | {B}
    assert all(_wants(at, number(mac)) for mac in listed)
    assert not _wants(at, number(A[:5] + b"\7"))


@daemon_serves
def test_a_guest_gets_of_groups_what_it_listens_to(net: Any) -> None:
    a, b, c = net.guest(), net.guest(wishes=Wishes(multicast=True)), net.guest()

    def gets(*groups: bytes) -> None:
        for group in (A, B, EVERYBODY, b"\2unknw"):
            a.vif.send(a.frame(group))
            assert c.vif.receive(5) == a.frame(group)
            if group in groups or group in (EVERYBODY, b"\2unknw"):
                assert b.vif.receive(5) == a.frame(group)
        nothing_came(b)

    gets()
    assert b.counted("filtered") == 2
    b.vif.groups.join(A)
    gets(A)
    b.vif.groups.join(B)
    b.vif.groups.leave(A)
    gets(B)
    b.vif.groups.filter(False)
    a.vif.send(a.frame(A))
    until(lambda: net.dom0.store.read(f"/local/domain/{b.domain.domid}/device/vif/0/request-multicast-control") == b"0")
    until(lambda: heard(a, b, A))
    b.vif.groups.filter(True)
    until(lambda: not heard(a, b, A))
    drained(c)
    gets(B)


def heard(a: Any, b: Any, group: bytes, seconds: float = 0.05) -> bool:
    """Whether a packet gets there in that time. It has a number: one of before that comes late is another."""
    return arrives(a, b, a.frame(group, next(_numbers).to_bytes(8, "big")), seconds)


def arrives(a: Any, b: Any, frame: bytes, seconds: float) -> bool:
    a.vif.send(frame)
    deadline = time.monotonic() + seconds
    try:
        while b.vif.receive(max(deadline - time.monotonic(), 0)) != frame:
            pass
        return True
    except TimeoutError:
        return False


def drained(guest: Any) -> None:
    try:
        while True:
            guest.vif.receive(0.1)
    except TimeoutError:
        pass


@daemon_serves
def test_an_answer_that_came_too_late_is_none_to_the_next_request(net: Any) -> None:
    """By a guest that sends nothing, which would have found it."""
    a, b = net.guest(), net.guest(wishes=Wishes(multicast=True))
    for ask, group in ((b.vif.groups.join, A), (b.vif.groups.leave, A)):
        with pytest.raises(TimeoutError):
            ask(group, timeout=0)
        b.vif.groups.join(B, timeout=5)
    assert b.vif.groups.joined == {B}
    a.vif.send(a.frame(A))
    a.vif.send(a.frame(B))
    assert b.vif.receive(5) == a.frame(B)


@daemon_serves
def test_groups_beyond_the_limit_and_after_a_reconnect(net: Any) -> None:
    a, b = net.guest(), net.guest(wishes=Wishes(multicast=True))
    for k in range(MOST_GROUPS):
        b.vif.groups.join(A[:5] + bytes([k]))
    with pytest.raises(OSError, match="does not add group") as raised:
        b.vif.groups.join(B)
    assert raised.value.errno == errno.ENOSPC
    b.vif.groups.leave(A[:5] + b"\0")
    b.vif.groups.join(B)
    net.dom0.store.write(f"{b.backend}/state", 5)  # as `xl block-attach` of another backend would have it: Closing
    until(lambda: b.vif.connections == 2)
    until(lambda: heard(a, b, B))
    assert not heard(a, b, A[:5] + b"\0")
    assert heard(a, b, A[:5] + b"\1", 5)


@daemon_serves
def test_a_daemon_that_takes_over_knows_the_groups(net: Any) -> None:
    a, b = net.guest(), net.guest(wishes=Wishes(multicast=True))
    b.vif.groups.join(A)
    for times in range(1, 3):
        net.daemon.kill()
        net.daemon.start()
        until(lambda: heard(a, b, A))
        assert not heard(a, b, B)
        assert b.counted("filtered") == 1, "by this daemon"
        b.vif.groups.join(B)
        assert heard(a, b, B, 5)
        b.vif.groups.leave(B)
        assert not heard(a, b, B)
        assert b.vif.connections == 1, times


@daemon_serves
@pytest.mark.parametrize("what", ["is gone", "is of a connection before", "is a part of it"])
def test_a_daemon_that_does_not_find_the_groups_filters_none(net: Any, what: str) -> None:
    """Until the guest connects anew. What the file was is there no more then."""
    a, b = net.guest(), net.guest(wishes=Wishes(multicast=True))
    file = net.run_dir / "groups" / b.name
    said = file.read_bytes()
    assert said.startswith(f"pvdrivers groups 1 {b.name} ".encode())
    b.vif.groups.join(A)
    assert not heard(a, b, B)
    net.daemon.kill()
    file.unlink()
    if what != "is gone":
        file.write_bytes(said.replace(b"+", b"-", 1) if "before" in what else said[:4096])
    net.daemon.start()
    until(lambda: heard(a, b, B))
    assert b.vif.connections == 1
    net.dom0.store.write(f"{b.backend}/state", 5)
    until(lambda: b.vif.connections == 2)
    until(lambda: not heard(a, b, B))
    assert heard(a, b, A, 5)
    net.guests.remove(b)
    b.end()
    until(lambda: not file.exists())


def test_a_list_that_a_process_has_died_in_is_one(tmp_path: Path) -> None:
    """It has moved the last into the place of one that is to go, and not said yet that there is one less."""
    path = tmp_path / "groups" / "vif-1-0"
    file = KeptFile(path, GROUPS, "one", recover=False)
    assert not file.found
    file.record[0]["count"], file.record[0]["listed"][:4] = 3, (7, 9, 9, 11)
    again = KeptFile(path, GROUPS, "one", recover=True)
    assert again.found
    tidy(again)
    assert again.record[0]["count"] == 2 and set(again.record[0]["listed"][:2].tolist()) == {7, 9}
    again.record[0]["count"] = 1 << 40
    tidy(again)
    assert again.record[0]["count"] <= MOST_GROUPS
    assert not KeptFile(path, GROUPS, "another", recover=True).found
    assert KeptFile(path, GROUPS, "another", recover=False).record[0]["count"] == 0


@daemon_serves
def test_link_down_and_up(net: Any) -> None:
    a, b = net.guest(), net.guest()
    key = f"{b.backend}/link"
    changes: list[bool] = []
    b.vif.on_carrier.append(changes.append)
    net.dom0.store.write(key, "down")
    until(lambda: changes == [False])
    a.vif.send(a.frame(b))
    until(lambda: b.counted("no carrier") == 1)
    b.vif.send(b.frame(a))
    until(lambda: b.counted("no carrier") == 2)
    nothing_came(a, b)
    assert a.vif.stats()["tx_errors"] == b.vif.stats()["tx_errors"] == 0
    net.dom0.store.write(key, "up")
    until(lambda: changes == [False, True])
    a.vif.send(a.frame(b))
    assert b.vif.receive(5) == a.frame(b)


@daemon_serves
def test_nothing_that_a_guest_writes_holds_up_what_the_operator_changes(net: Any) -> None:
    """A headroom that is none is looked at when the guest is Reconfiguring, and fails that alone."""
    a, b = net.guest(), net.guest()
    path = f"/local/domain/{b.domain.domid}/device/vif/0"
    b.platform.store.write(f"{path}/{KEY_REQUEST_XDP_HEADROOM}", "x")
    net.dom0.store.write(f"{b.backend}/link", "down")
    until(lambda: not b.vif.carrier)
    a.vif.send(a.frame(b))
    until(lambda: b.counted("no carrier") == 1)
    net.dom0.store.write(f"{b.backend}/link", "up")
    until(lambda: b.vif.carrier)
    net.dom0.store.write(f"{b.backend}/mtu", 1000)
    until(lambda: not passes(a, b, a.frame(b, bytes(1001))))
    assert passes(a, b, a.frame(b, bytes(1000)), 5)
    assert not b.said() and b.vif.connections == 1
    b.platform.store.write(f"{path}/state", 7)
    until(lambda: b.vif.connections == 2 and b.vif.state == 4)
    assert "not a number" in logged(b)


@daemon_serves
def test_what_is_larger_than_the_mtu(net: Any) -> None:
    """14 bytes of header and any tags do not count; a packet of many segments is none."""
    a, b = net.guest(), net.guest(be={"mtu": 1500})
    vlan = b.mac + a.mac + b"\x81\0\0\5\x88\xb5"
    for good, bad in ((a.frame(b, bytes(1500)), a.frame(b, bytes(1501))), (vlan + bytes(1500), vlan + bytes(1501))):
        a.vif.send_all([Frame(bad), Frame(good)])
        assert b.vif.receive(5) == good
    assert b.counted("too large") == 2
    b.vif.send_all([Frame(b.frame(a, bytes(1501))), Frame(b.frame(a, bytes(1500)))])
    assert a.vif.receive(5) == b.frame(a, bytes(1500))
    assert b.counted("too large") == 3
    frame = Frame(tcp(4, bytes(30000), macs=b.mac + a.mac), CSUM_BLANK, 1448, GSO_TCPV4)
    a.vif.send_all([frame])
    assert b.vif.receive_all(1, 5) == [frame]
    net.dom0.store.write(f"{b.backend}/mtu", 9000)
    until(lambda: passes(a, b, a.frame(b, bytes(9000))))
    assert not passes(a, b, a.frame(b, bytes(9001)))


def passes(a: Any, b: Any, frame: bytes, seconds: float = 0.2) -> bool:
    """The same for a frame of some size."""
    return arrives(a, b, frame[:14] + next(_numbers).to_bytes(8, "big") + frame[22:], seconds)


@daemon_serves
@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("mtu", "67", "not from 68 to 65521"),
        ("mtu", "65522", "not from 68 to 65521"),
        ("mtu", "big", "not a number"),
        ("rate", "10MB/s", "not BYTES,MICROSECONDS"),
        ("rate", "0,50000", "not BYTES,MICROSECONDS"),
        ("rate", "1000,0", "not BYTES,MICROSECONDS"),
        ("link", "sideways", "not one of down, up"),
        ("rx_drain_timeout_msecs", "-1", "not from 0"),
    ],
)
def test_keys_of_the_toolstack_that_make_no_sense(net: Any, key: str, value: str, text: str) -> None:
    """At the start it is not served, and says so; once it is connected, what was stays."""
    guest = net.guest(connect=False, be={key: value})
    guest.vif.start()
    until(lambda: text in guest.said() and key in guest.said())
    net.dom0.store.rm(f"{guest.backend}/{key}")
    guest.vif.connect(20)
    net.dom0.store.write(f"{guest.backend}/{key}", value)
    until(lambda: text in guest.said())
    other = net.guest()
    other.vif.send(other.frame(guest))
    assert guest.vif.receive(5) == other.frame(guest)


def test_rates() -> None:
    assert parse_rate("500000,50000") == (10e6, 500000)
    assert parse_rate("1000,50000") == (20e3, 131072)
