"""Guests that send each other frames by a real daemon: who gets them, who does not, and what is counted."""

from __future__ import annotations

import os
from typing import Any

import pytest

from pvdrivers.cli.stats import snapshot
from pvdrivers.frontends.netfront import CSUM_BLANK, CSUM_NONE, CSUM_VALID, Frame
from pvdrivers.frontends.netfront_keys import Wishes

from .conftest import Guest, until

pytestmark = pytest.mark.jit_only("a real daemon serves")
EVERYBODY = b"\xff" * 6


def nothing_came(*guests: Guest) -> None:
    for guest in guests:
        with pytest.raises(TimeoutError):
            guest.vif.receive(0.05)


@pytest.mark.parametrize("split", [True, False])
def test_what_one_sends_the_other_gets(net: Any, split: bool) -> None:
    a, b = net.guest(wishes=Wishes(split=split)), net.guest(wishes=Wishes(split=split))
    for size in (14, 60, 127, 128, 129, 1514, 4095, 4096, 4097, 9014, 65535):
        for sender, receiver in ((a, b), (b, a)):
            frame = sender.frame(receiver, os.urandom(size - 14))
            sender.vif.send(frame)
            assert receiver.vif.receive(5) == frame
    assert a.vif.stats()["tx_errors"] == b.vif.stats()["rx_errors"] == 0
    assert a.counted("sent") == b.counted("received") == 11


def test_all_of_many_arrive_in_order(net: Any) -> None:
    a, b = net.guest(), net.guest()
    for start in range(0, 2000, 50):
        a.vif.send_all([Frame(a.frame(b, i.to_bytes(4, "big") * 300)) for i in range(start, start + 50)])
        got: list[Frame] = []
        while len(got) < 50:
            got += b.vif.receive_all(64, 5)
        assert [int.from_bytes(f.data[14:18], "big") for f in got] == list(range(start, start + 50))


def test_who_gets_what(net: Any) -> None:
    """A known address is one port's, an unknown one and a group's are everybody's; other switches hear nothing."""
    a, b, c, other = net.guest(), net.guest(), net.guest(), net.guest("switch:other")
    for to in (EVERYBODY, b"\x01\0\x5e\0\0\1", b"\2unknw"):
        frame = a.frame(to, b"to all")
        a.vif.send(frame)
        assert b.vif.receive(5) == c.vif.receive(5) == frame
    a.vif.send(a.frame(b))
    assert b.vif.receive(5) == a.frame(b)
    nothing_came(a, c, other)
    a.vif.send(a.frame(a))  # its own port: nobody's
    nothing_came(a, b, c)


def test_what_a_batch_teaches_counts_within_it(net: Any) -> None:
    """What was looked up for one packet is not believed for the next when an address was learned in between."""
    a, b = net.guest(), net.guest()
    inner, other = b"\2inner", b"\2other"
    frames = [
        inner + other + b"\x88\xb5to nobody that is known",
        b.mac + inner + b"\x88\xb5from it, by the same port",
        inner + other + b"\x88\xb5now it is known",
        b.mac + a.mac + b"\x88\xb5to b",
        EVERYBODY + b.mac + b"\x88\xb5from another's own address",
        b.mac + a.mac + b"\x88\xb5to b again",
    ]
    a.vif.send_all([Frame(one) for one in frames])
    assert [b.vif.receive(5) for _ in range(4)] == [frames[k] for k in (0, 1, 3, 5)]
    nothing_came(b)
    assert a.counted("spoofed") == 1


def test_an_address_is_learned_and_moves_but_nobody_takes_that_of_a_vif(net: Any) -> None:
    a, b, c = net.guest(), net.guest(), net.guest()
    inner = b"\2inner"
    for home, stranger in ((b, c), (c, b)):  # a guest within b, which moves to c
        home.vif.send(EVERYBODY + inner + b"\x88\xb5hello")
        assert a.vif.receive(5)[6:12] == inner
        stranger.vif.receive(5)
        a.vif.send(a.frame(inner))
        assert home.vif.receive(5) == a.frame(inner)
        nothing_came(stranger)
    c.vif.send(a.mac + b.mac + b"\x88\xb5I am b")
    until(lambda: c.counted("spoofed") == 1)
    c.vif.send(a.mac + b"\x01\0\0\0\0\1" + b"\x88\xb5I am many")
    until(lambda: c.counted("spoofed") == 2)
    nothing_came(a)
    a.vif.send(a.frame(b))
    assert b.vif.receive(5) == a.frame(b)


def test_a_receiver_that_takes_nothing_loses_packets_and_nobody_else_does(net: Any) -> None:
    """XSA-392 (CVE-2021-28715): what waits for a guest that keeps one slot free is bounded."""
    a, b, c = net.guest(), net.guest(), net.guest()
    frame = a.frame(b, bytes(4096 * 15 - 14))
    for _ in range(17 + 18):  # it has room for 17, and then keeps one slot free
        a.vif.send(frame)
    until(lambda: a.counted("sent") == 35)
    until(lambda: (b.counted("received"), b.counted("dropped")) == (17, 10))  # and eight wait, in 512 KiB
    a.vif.send(a.frame(c, b"you too?"))
    assert c.vif.receive(5) == a.frame(c, b"you too?")
    for _ in range(25):
        assert b.vif.receive(5) == frame
    nothing_came(b)
    assert b.counted("received") == 25
    a.vif.send(a.frame(b))
    assert b.vif.receive(5) == a.frame(b)


def test_null(net: Any) -> None:
    a, b = net.guest("null:"), net.guest("null:")
    a.vif.send(a.frame(b))
    until(lambda: a.counted("to nobody") == 1)
    assert a.vif.stats()["tx_errors"] == 0
    nothing_came(b)


def udp(payload: bytes) -> tuple[bytes, bytes]:
    """An IPv4 packet with UDP and a blank checksum, and the same with a complete one (RFC 768)."""

    def ones(data: bytes, start: int = 0) -> int:
        total = start + sum(int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big") for i in range(0, len(data), 2))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        return total

    length = 8 + len(payload)
    addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
    ip = bytes([0x45, 0]) + (20 + length).to_bytes(2, "big") + bytes([0, 0, 0, 0, 64, 17, 0, 0]) + addresses
    pseudo = ones(addresses + bytes([0, 17]) + length.to_bytes(2, "big"))
    header = bytes([0, 7, 0, 9]) + length.to_bytes(2, "big")
    whole = ones(header + pseudo.to_bytes(2, "big") + payload) ^ 0xFFFF or 0xFFFF
    return ip + header + pseudo.to_bytes(2, "big") + payload, ip + header + whole.to_bytes(2, "big") + payload


@pytest.mark.parametrize("size", [0, 1, 17, 1000, 8001])
def test_checksums(net: Any, size: int) -> None:
    """A blank one stays blank for who takes it, and is completed for who does not."""
    a, b, c = net.guest(), net.guest(), net.guest(wishes=Wishes(csum4=False))
    blank, complete = udp(os.urandom(size))
    for guest, got in (
        (b, Frame(a.frame(b, blank, 0x800), CSUM_BLANK)),
        (c, Frame(a.frame(c, complete, 0x800), CSUM_VALID)),
    ):
        a.vif.send(a.frame(guest, blank, 0x800), csum=CSUM_BLANK)
        assert guest.vif.receive_all(1, 5) == [got]
    a.vif.send(a.frame(EVERYBODY, blank, 0x800), csum=CSUM_BLANK)
    assert (
        b.vif.receive_all(1, 5) == c.vif.receive_all(1, 5) == [Frame(a.frame(EVERYBODY, complete, 0x800), CSUM_VALID)]
    )
    a.vif.send(a.frame(b, complete, 0x800), csum=CSUM_VALID)
    assert b.vif.receive_all(1, 5)[0].csum == CSUM_VALID
    a.vif.send(a.frame(c, complete, 0x800))
    assert c.vif.receive_all(1, 5)[0].csum == CSUM_NONE


def test_segments_go_as_one_packet_to_who_takes_them(net: Any) -> None:
    a, b, c = net.guest(), net.guest(), net.guest(wishes=Wishes(gso=False))
    frame = Frame(a.frame(b, os.urandom(60000), 0x800), CSUM_BLANK, 1448, 1)
    a.vif.send_all([frame])
    assert b.vif.receive_all(1, 5) == [frame]
    a.vif.send_all([Frame(a.frame(c, bytes(60000), 0x800), CSUM_BLANK, 1448, 1)])  # no TCP: nobody could cut it
    until(lambda: c.counted("not accepted") == 1)


def test_queues(net: Any) -> None:
    """A flow of a queue stays in its queue; many flows are in all of them."""
    a, b = net.guest(queues=3), net.guest(queues=4)
    assert (len(a.vif.queues), len(b.vif.queues)) == (3, 4)
    for flow in range(40):
        src = flow.to_bytes(2, "big")
        payload = bytes([0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]) + src + bytes(6)
        for queue in range(3):
            a.vif.send(a.frame(b, payload + bytes([queue]), 0x800), queue=queue)
    got: dict[bytes, set[int]] = {}
    until(lambda: b.counted("received") == 40 * 3)
    for queue in range(4):
        try:
            while True:
                for f in b.vif.receive_all(64, 0.2, queue=queue):
                    got.setdefault(f.data[34:36] + f.data[42:], set()).add(queue)
        except TimeoutError:
            pass
    assert len(got) == 40 * 3
    assert all(len(queues) == 1 for queues in got.values())
    assert set().union(*got.values()) == {0, 1, 2, 3}


def test_a_killed_daemon_is_not_noticed(net: Any) -> None:
    a, b = net.guest(), net.guest()
    a.vif.send(a.frame(b, b"before"))
    assert b.vif.receive(5) == a.frame(b, b"before")
    net.daemon.kill()
    a.vif.send(a.frame(b, b"meanwhile"))
    net.daemon.start()

    def heard() -> bool:  # not all: what comes before the receiver has been found is lost
        a.vif.send(a.frame(b, b"after"))
        try:
            return b.vif.receive(0.1) in (a.frame(b, b"meanwhile"), a.frame(b, b"after"))
        except TimeoutError:
            return False

    until(heard)
    b.vif.send(b.frame(a, b"after"))
    assert a.vif.receive(5) == b.frame(a, b"after")
    assert a.vif.connections == b.vif.connections == 1


def test_a_guest_that_migrates_is_there_twice_for_a_while(net: Any) -> None:
    """With one address. That of another guest is an error, as before."""
    store = net.dom0.store
    old, other = net.guest(), net.guest()
    new, liar = (net.guest(mac=old.mac, connect=False) for _ in range(2))
    store.write(f"/local/domain/{new.domain.domid}/vm", store.read(f"/local/domain/{old.domain.domid}/vm"))
    for guest in (new, liar):
        guest.vif.start()
    until(lambda: "is that of" in liar.said())
    net.guests.remove(liar)
    liar.end()  # or it might have the address first

    def waits() -> bool:
        return any(
            f"waits for domain {old.domain.domid}" in text
            for d in snapshot(net.run_dir) if d["device"] == new.name for text in d.get("troubles", {}).values()
        )  # fmt: skip

    until(waits)
    other.vif.send(other.frame(old, b"still here"))
    assert old.vif.receive(5) == other.frame(old, b"still here")
    assert not new.said() and store.read(f"{new.backend}/state") == b"2"
    net.guests.remove(old)
    old.end()
    until(lambda: new.vif.state == 4)
    assert new.vif.connections == 1 and not new.said()
    until(lambda: not waits())
    new.vif.send(new.frame(other, b"here now"))
    assert other.vif.receive(5) == new.frame(other, b"here now")


def test_a_guest_that_goes_while_it_receives(net: Any) -> None:
    """CVE-2021-28691 (XSA-374): disconnect during receive. And it comes back, at the same address."""
    a, b, c = net.guest(), net.guest(), net.guest()
    for _ in range(3):
        for _ in range(200):
            a.vif.send(a.frame(b, bytes(3000)))
        b.end()
        net.guests.remove(b)
        for _ in range(50):
            a.vif.send(a.frame(b, bytes(3000)))
        b = net.guest(mac=b.mac)
        a.vif.send(a.frame(c, b"still here"))
        while a.frame(c, b"still here") != c.vif.receive(5):
            pass
        a.vif.send(a.frame(b, b"back"))
        assert b.vif.receive(5) == a.frame(b, b"back")
