"""Packets that have come by one port go out by others. The heart of the switch; knows no ring of a sender.

    look      the first bytes are private: parse them
    route     learn who sent it, find who is to have it
    gather    those that are looked into as a whole, or leave by a file descriptor: the rest of their bytes, in one call
    send      to each receiver, in one call for all

Where a switch has several shards (see `crossing`), a receiver's queue may be another worker's. Then the packet goes
there once, whoever its receivers there are, and that shard sends it on: to those whose queue, chosen as it was here, is
its own, and never to a third.
"""

from __future__ import annotations

from typing import Any

from pvdrivers.worker.batch import op_at, seam_of
from pvdrivers.worker.marks import stats_at, worker_at
from rings.atomics import call, i64, load_once64
from rings.jit import inline, kernel
from rings.netif import RSP_ERROR
from rings.vnet import CSUM_BLANK

from .crossing import cross, send_links
from .deliver import begin, flush, takes_blank
from .frame import fill_checksum, flow_of, parse
from .gather import gather
from .hashing import choose_queue
from .port_out import goes_from_pages, to_port
from .receive import may_leave, takes_whole, to_vif
from .records import (
    N_NOBODY,
    N_SPOOFED,
    P_SEND,
    PACKET,
    PORT_VIF,
    TO_ALL,
    TO_NOBODY,
    VLAN_SHIFT,
    packet_at,
    port_at,
    switch_at,
)
from .table import find, learn, look_for_new
from .vlan import admits, classify, retag, suits

_PACKET_SIZE = PACKET.itemsize
_LOOK, _SEND, _AGAIN = range(3)
"""What _each() does: notes what is needed; sends; sends what was tagged or untagged meanwhile."""


@inline
def packet_of(swa: int, k: int) -> int:
    """The address of the switch's packet k."""
    return switch_at(swa)["packets"] + k * _PACKET_SIZE


@kernel
def _find(wa: int, swa: int, porta: int, mac: int) -> int:
    """Where an address is that the last packet was not to: PACKET.to."""
    sw = switch_at(swa)
    index = find(swa, mac, worker_at(wa)["now"])
    to = index if index >= 0 else i64(TO_ALL)
    sw["last_dst"], sw["last_to"] = mac, i64(TO_NOBODY) if index == port_at(porta)["index"] else to
    return sw["last_to"]


@kernel
def _learn(wa: int, swa: int, porta: int, mac: int) -> bool:
    """Learn the address of a packet, which is not that of the last one."""
    sw = switch_at(swa)
    sw["last_dst"] = -1  # it may be where it was not just now
    sw["last_src"] = -1
    if mac & 1 != 0 or not learn(swa, porta, mac, worker_at(wa)["now"], 0):
        return False
    sw["last_src"] = mac
    return True


@kernel
def _route(wa: int, swa: int, porta: int, pa: int, stats: int) -> None:
    """Learn, and choose: PACKET.to. Many come in a row from one guest to one other, so what was last is remembered."""
    packet = packet_at(pa)
    parse(pa)
    if not may_leave(pa, porta, stats):
        packet["to"] = TO_NOBODY
        return
    if switch_at(swa)["wire"] != 0:
        packet["to"] = TO_ALL
        return
    packet["to"] = TO_NOBODY
    vlan = i64(0)
    if switch_at(swa)["vlans"] != 0:
        if not classify(pa, porta):
            stats_at(stats)["kinds"][N_NOBODY] += 1
            return
        vlan = packet["vlan"] << VLAN_SHIFT
    sw = switch_at(swa)
    src, dst = packet["src"] | vlan, packet["dst"] | vlan
    if src != sw["last_src"] and not _learn(wa, swa, porta, src):
        stats_at(stats)["kinds"][N_SPOOFED] += 1
        return
    if packet["dst"] & 1 != 0:
        packet["to"] = TO_ALL
        return
    index = sw["last_to"] if dst == sw["last_dst"] else i64(_find(wa, swa, porta, dst))
    packet["to"] = index
    if index >= 0 and sw["shards"] > 1:
        other = load_once64(swa + index * 8)  # SWITCH.ports is the first field; it may become 0
        if other != 0:
            packet["epoch"] = port_at(other)["epoch"]


@inline
def _note_wishes(pa: int, porta: int) -> None:
    """What a receiver of the packet needs: all of its bytes here, or its checksum complete, and so its bytes."""
    packet = packet_at(pa)
    port = port_at(porta)
    if packet["csum"] == CSUM_BLANK and packet["gso_size"] == 0 and packet["l4"] != 0:
        if not takes_blank(packet, port["accepts"]):
            packet["fill"] = 1
    if port["kind"] == PORT_VIF:
        whole = takes_whole(packet, port["accepts"], port["headroom"])
    else:
        whole = goes_from_pages(pa)
    if not whole or packet["fill"] != 0 or port["capture"] != 0:
        packet["want"] = packet["size"]


@inline
def _send_to(wa: int, swa: int, pa: int, porta: int, ra: int) -> None:
    if port_at(porta)["kind"] == PORT_VIF:
        to_vif(wa, swa, pa, porta, ra)
    else:
        to_port(swa, pa, ra)


@inline
def _queue_of(swa: int, pa: int, porta: int) -> int:
    """The queue of a receiver that a packet goes to; -1 if it has none, as it leaves."""
    port = port_at(porta)
    queues = port["n_out"]
    if queues == 0:
        return i64(-1)
    if port["kind"] != PORT_VIF and switch_at(swa)["shards"] <= 1:
        return i64(flow_of(pa)) % queues if queues > 1 else i64(0)
    return choose_queue(porta, pa, queues, switch_at(swa)["shards"])


@kernel
def _each(wa: int, swa: int, porta: int, pa: int, what: int) -> int:
    """For every receiver of a packet: send it if its tag is as that wants it, or note what is needed. How many there
    are."""
    sw = switch_at(swa)
    to = packet_at(pa)["to"]
    found = i64(0)
    if to == TO_NOBODY:
        return found
    first, last = (i64(0), sw["top"]) if to == TO_ALL else (to, to + 1)
    for i in range(first, last):
        other = sw["ports"][i]
        if other == 0 or other == porta:
            continue
        if sw["vlans"] != 0 and not admits(pa, other):
            continue
        k = i64(-1)
        if sw["shards"] > 1:
            k = i64(_queue_of(swa, pa, other))
            there = (port_at(other)["home"] + k) % sw["shards"] if k >= 0 else sw["shard"]
            if there != sw["shard"]:
                # Here only if it is from here; one that has come by a link was sent there as well.
                if packet_at(pa)["origin"] == sw["shard"]:
                    found += 1
                    if what == _SEND:
                        packet_at(pa)["links"] |= i64(1) << there
                continue
        elif what != _LOOK:
            k = i64(_queue_of(swa, pa, other))
        if sw["vlans"] != 0 and not suits(pa, other):
            if what != _LOOK:
                continue
            packet_at(pa)["retag"] = 1
        found += 1
        if what == _LOOK:
            _note_wishes(pa, other)
        elif k >= 0:
            _send_to(wa, swa, pa, other, port_at(other)["out"][k])
    return found


@kernel
def fetch(wa: int, swa: int, n: int) -> int:
    """What the switch's first n packets want of their bytes, to private memory, in one call: how many copies it was.
    Who lacks a page for it is refused."""
    w = worker_at(wa)
    ops = i64(0)
    for k in range(n):
        pa = packet_of(swa, k)
        packet = packet_at(pa)
        if packet["verdict"] == P_SEND and packet["status"] == 0 and packet["have"] < packet["want"]:
            ops = gather(wa, pa, packet["data"], packet["want"], ops)
            packet["have"] = packet["want"]
        packet["last_op"] = ops
    if ops == 0:
        return ops
    seam = seam_of(wa)
    if call(seam["grant_copy"], seam["grant_ctx"], w["ops"], ops, 0) == 0:
        return ops
    at = i64(0)
    for k in range(n):
        packet = packet_at(packet_of(swa, k))
        while at < packet["last_op"]:
            if op_at(w["ops"], at)["status"] != 0:
                packet["status"] = RSP_ERROR
            at += 1
    return ops


@inline
def _goes_on(packet: Any) -> bool:
    return packet["verdict"] == P_SEND and packet["status"] == 0


@inline
def _source(porta: int, pa: int) -> int:
    """The port that a packet has come by; 0 for `porta`: to another shard."""
    return porta if porta != 0 else packet_at(pa)["source"]


@kernel
def _send_retagged(wa: int, swa: int, porta: int, n: int) -> None:
    """To those that want packets the other way: with a tag, or without. All others have been copied by then."""
    flush(wa, swa)
    for k in range(n):
        pa = packet_of(swa, k)
        packet = packet_at(pa)
        if _goes_on(packet) and packet["to"] != TO_NOBODY and packet["retag"] != 0:
            retag(pa)
            packet["retag"] = 2
            _each(wa, swa, _source(porta, pa), pa, _AGAIN)
    flush(wa, swa)
    for k in range(n):
        pa = packet_of(swa, k)
        packet = packet_at(pa)
        if packet["retag"] == 2:
            retag(pa)
        packet["retag"] = 0


@kernel
def _still_there(swa: int, pa: int) -> bool:
    """Whether the port is the one that a packet was sent to, by another shard."""
    packet = packet_at(pa)
    to = packet["to"]
    if to == TO_ALL:
        return True
    porta = switch_at(swa)["ports"][to]
    return porta != 0 and port_at(porta)["epoch"] == packet["epoch"]


@kernel
def forward(wa: int, swa: int, porta: int, n: int, stats: int) -> None:
    """Send on the switch's first n packets, which have come by a port and of which the first bytes are private.

    Of those that are refused, or become so, PACKET.status is not 0. When it returns nothing is on its way but to
    another shard.
    """
    begin(swa)
    several = switch_at(swa)["shards"] > 1
    switch_at(swa)["last_src"], switch_at(swa)["last_dst"] = -1, -1
    if several:
        look_for_new(swa, worker_at(wa)["now"])
    for k in range(n):
        pa = packet_of(swa, k)
        packet = packet_at(pa)
        if _goes_on(packet):
            packet["fill"] = 0
            if several:
                packet["origin"], packet["source"], packet["links"] = switch_at(swa)["shard"], porta, 0
            _route(wa, swa, porta, pa, stats)
            if packet["to"] != TO_NOBODY and _each(wa, swa, porta, pa, _LOOK) == 0:
                packet["to"] = TO_NOBODY
                stats_at(stats)["kinds"][N_NOBODY] += 1
    stats_at(stats)["grants_copied"] += fetch(wa, swa, n)
    for k in range(n):
        pa = packet_of(swa, k)
        packet = packet_at(pa)
        if _goes_on(packet):
            if packet["fill"] != 0:
                fill_checksum(pa)
            _each(wa, swa, porta, pa, _SEND)
            if several and packet["links"] != 0:
                cross(wa, swa, pa, stats)
    if switch_at(swa)["vlans"] != 0:
        _send_retagged(wa, swa, porta, n)
    flush(wa, swa)
    if several:
        send_links(swa)  # not before: all of their bytes are there, or they say that they are not


@kernel
def deliver_arrived(wa: int, swa: int, n: int) -> None:
    """Send on the switch's first n packets, which have come from other shards: all of their bytes are private."""
    begin(swa)
    look_for_new(swa, worker_at(wa)["now"])
    for k in range(n):
        pa = packet_of(swa, k)
        packet = packet_at(pa)
        if _goes_on(packet):
            packet["fill"] = 0
            if _still_there(swa, pa):
                _each(wa, swa, packet["source"], pa, _LOOK)
            else:
                packet["to"] = TO_NOBODY
    for k in range(n):
        pa = packet_of(swa, k)
        packet = packet_at(pa)
        if _goes_on(packet):
            if packet["fill"] != 0:
                fill_checksum(pa)
            _each(wa, swa, packet["source"], pa, _SEND)
    if switch_at(swa)["vlans"] != 0:
        _send_retagged(wa, swa, i64(0), n)
    flush(wa, swa)
