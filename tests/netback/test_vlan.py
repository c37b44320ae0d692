"""VLANs: the tag of a packet, whatever it is made of; and guests that send each other packets by a daemon."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netback.records import HEADROOM, PACKET, PORT
from netback.switch import Port, _bits
from netback.vlan import admits, classify, retag
from pvdrivers.frontends.netfront import CSUM_BLANK, CSUM_VALID, Frame

from .conftest import Guest, until
from .test_switch import EVERYBODY, nothing_came, udp


class Packet:
    """A PACKET with `have` private bytes, of a chain of pieces."""

    def __init__(self, data: bytes, have: int, pieces: list[int]) -> None:
        self.data, self.record = data, np.zeros(1, PACKET)
        self.memory = np.zeros(HEADROOM + len(data) + 8, np.uint8)
        self.memory[HEADROOM : HEADROOM + have] = np.frombuffer(data[:have], np.uint8)
        row = self.record[0]
        row["data"], row["size"], row["have"], row["want"] = self.memory.ctypes.data + HEADROOM, len(data), have, have
        at = 0
        for k, n in enumerate(pieces):  # the "gref" says where in `data` it begins
            row["fragment"][k]["gref"], row["fragment"][k]["offset"], row["fragment"][k]["length"] = at, 0, n
            at += n
        row["fragments"] = len(pieces)

    @property
    def address(self) -> int:
        return int(self.record.ctypes.data)

    def bytes(self) -> bytes:
        """What a receiver would get: the private bytes, and behind them those of the fragments."""
        row = self.record[0]
        begin = int(row["data"]) - int(self.memory.ctypes.data)
        out, at = self.memory[begin : begin + int(row["have"])].tobytes(), 0
        for k in range(int(row["fragments"])):
            piece = row["fragment"][k]
            length, start = int(piece["length"]), int(piece["gref"]) + int(piece["offset"])
            skip = max(len(out) - at, 0)
            if skip < length:
                assert skip >= 0 and at + skip == len(out)
                out += self.data[start + skip : start + length]
            at += length
        return out


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=18).filter(lambda sizes: sum(sizes) >= 18)


@given(SIZES, st.integers(18, 128), st.integers(1, 4094), st.booleans(), st.booleans())
def test_a_tag_goes_in_and_out(pieces: list[int], have: int, vlan: int, tagged: bool, private: bool) -> None:
    size = sum(pieces)
    body = bytes(k % 251 for k in range(size))
    tag = b"\x81\0" + vlan.to_bytes(2, "big")
    data = body[:12] + tag + body[16:] if tagged else body
    packet = Packet(data, size if private else min(have, size), [] if private else pieces)
    row = packet.record[0]
    row["vlan"], row["tagged"], row["l4"], row["csum_at"] = vlan, tagged, 34, 50
    row["l3"], row["ip"] = 4, 14
    before = (int(row["data"]), packet.bytes())
    assert before[1] == data
    retag(packet.address)
    other = data[:12] + data[16:] if tagged else data[:12] + tag + data[12:]
    assert packet.bytes() == other
    delta = len(other) - len(data)
    assert (int(row["size"]), int(row["ip"]), int(row["l4"])) == (len(other), 14 + delta, 34 + delta)
    retag(packet.address)
    assert (int(row["data"]), packet.bytes(), int(row["size"])) == (*before, len(data))


KINDS = st.one_of(
    st.just((0, None)),
    st.integers(1, 3).map(lambda v: (v, None)),
    st.frozensets(st.integers(1, 3)).map(lambda t: (0, t)),
)


def _port(kind: tuple[int, frozenset[int] | None]) -> np.ndarray:
    record = np.zeros(1, PORT)
    record[0]["vlan"], record[0]["trunk"], record[0]["allowed"] = kind[0], kind[1] is not None, _bits(kind[1] or ())
    return record


@given(KINDS, KINDS, st.sampled_from(["none", "8100", "88a8"]), st.integers(0, 4))
def test_nothing_leaves_its_vlan(sender: Any, receiver: Any, tag: str, vlan: int) -> None:
    """Against the rules of the module, said again."""
    head = b"" if tag == "none" else bytes.fromhex(tag) + vlan.to_bytes(2, "big")
    packet = Packet(bytes(12) + head + b"\x88\xb5" + bytes(20), 30, [])
    here, there = _port(sender), _port(receiver)
    of: int | None
    if sender[1] is not None:
        of = 0 if tag == "none" else vlan if tag == "8100" and vlan in sender[1] else None
    elif sender[0]:
        of = sender[0] if tag == "none" else None
    else:
        of = 0
    assert bool(classify(packet.address, here.ctypes.data)) == (of is not None)
    if of is None:
        return
    assert int(packet.record[0]["vlan"]) == of
    if receiver[1] is not None:
        may = of in receiver[1] if of else tag == "none"
    else:
        may = receiver[0] == of
    assert bool(admits(packet.address, there.ctypes.data)) == may


def test_bits() -> None:
    port = Port("x", trunk=frozenset({1, 31, 32, 4094}))
    bits = np.unpackbits(_bits(port.trunk or ()).view(np.uint8), bitorder="little")
    assert list(np.flatnonzero(bits)) == [1, 31, 32, 4094]


def tagged(frame: bytes, vlan: int) -> bytes:
    return frame[:12] + b"\x81\0" + vlan.to_bytes(2, "big") + frame[12:]


@pytest.mark.jit_only("a real daemon serves")
def test_guests_in_vlans(net: Any) -> None:
    a5, b5, a6, plain = (net.guest(f"switch:v{o}") for o in (";vlan=5", ";vlan=5", ",vlan=6", ""))
    trunk, narrow = net.guest("switch:v;trunk"), net.guest("switch:v;trunk=6+10-20")
    for size in (20, 130, 5000, 65000):
        frame = a5.frame(EVERYBODY, os.urandom(size))
        a5.vif.send(frame)
        assert b5.vif.receive(5) == frame
        assert trunk.vif.receive(5) == tagged(frame, 5)
        nothing_came(a6, plain, narrow)
        frame = trunk.frame(EVERYBODY, os.urandom(size))
        trunk.vif.send(tagged(frame, 6))
        assert a6.vif.receive(5) == frame
        assert narrow.vif.receive(5) == tagged(frame, 6)
        nothing_came(a5, b5, plain)
    # To one address, which is known in its VLAN only.
    b5.vif.send(b5.frame(a5, b"for one"))
    assert a5.vif.receive(5) == b5.frame(a5, b"for one")
    trunk.vif.send(tagged(trunk.frame(a5), 5))
    assert a5.vif.receive(5) == trunk.frame(a5)
    nothing_came(b5, narrow)
    # The same address in two VLANs is two stations.
    for guest in (b5, a6):
        guest.vif.send(guest.frame(EVERYBODY)[:6] + b"\2twice" + b"\x88\xb5")
    for guest in (a5, trunk, trunk, narrow):
        guest.vif.receive(5)
    a5.vif.send(a5.frame(b"\2twice"))
    assert b5.vif.receive(5)[:6] == b"\2twice"
    nothing_came(a6, trunk, narrow)


@pytest.mark.jit_only("a real daemon serves")
def test_who_hops_into_a_vlan_does_not_get_there(net: Any) -> None:
    a5, b6, plain, other = (net.guest(f"switch:w{o}") for o in (";vlan=5", ";vlan=6", "", ""))
    trunk = net.guest("switch:w;trunk=5")
    before = a5.counted("to nobody")
    a5.vif.send(tagged(a5.frame(EVERYBODY), 6))  # a tag from where there are none
    until(lambda: a5.counted("to nobody") == before + 1)
    trunk.vif.send(tagged(trunk.frame(EVERYBODY), 6))  # not of this trunk
    plain.vif.send(tagged(plain.frame(EVERYBODY), 5))  # a tag that nobody looks at, but where it would be one
    assert other.vif.receive(5) == tagged(plain.frame(EVERYBODY), 5)
    nothing_came(a5, b6, trunk)
    a5.vif.send(tagged(a5.frame(other), 5))
    nothing_came(other, plain)


@pytest.mark.jit_only("a real daemon serves")
def test_nobody_has_a_trunks_own_address_in_its_vlans(net: Any) -> None:
    a5, b5, a6 = (net.guest(f"switch:z;vlan={vlan}") for vlan in (5, 5, 6))
    trunk = net.guest("switch:z;trunk=5")
    b5.vif.send(b5.frame(trunk))
    assert trunk.vif.receive(5) == tagged(b5.frame(trunk), 5)
    nothing_came(a5)  # it is known, and was never heard of there
    a5.vif.send(b5.mac + trunk.mac + b"\x88\xb5as if it were the trunk")
    until(lambda: a5.counted("spoofed") == 1)
    b5.vif.send(b5.frame(trunk))
    assert trunk.vif.receive(5) == tagged(b5.frame(trunk), 5)
    nothing_came(a5, b5)
    a6.vif.send(a6.frame(EVERYBODY)[:6] + trunk.mac + b"\x88\xb5")  # the trunk has not that VLAN
    until(lambda: a6.counted("to nobody") == 1)
    assert a6.counted("spoofed") == 0


@pytest.mark.jit_only("a real daemon serves")
def test_a_checksum_is_complete_behind_a_tag(net: Any) -> None:
    a, b, trunk = net.guest("switch:x;vlan=7"), net.guest("switch:x;vlan=7"), net.guest("switch:x;trunk")
    blank, complete = udp(os.urandom(3000))
    a.vif.send(a.frame(EVERYBODY, blank, 0x800), csum=CSUM_BLANK)
    frame = a.frame(EVERYBODY, complete, 0x800)
    assert b.vif.receive_all(1, 5) == [Frame(frame, CSUM_VALID)]
    assert trunk.vif.receive_all(1, 5) == [Frame(tagged(frame, 7), CSUM_VALID)]


@pytest.mark.jit_only("a real daemon serves")
def test_one_address_in_two_vlans_is_no_error(net: Any) -> None:
    first = net.guest("switch:y;vlan=1")
    net.guest("switch:y;vlan=2", mac=first.mac)
    third: Guest = net.guest("switch:y;vlan=1", mac=first.mac, connect=False)
    third.vif.start()
    until(lambda: "is that of vif-" in third.said())
