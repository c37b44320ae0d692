"""Guests on a switch of two workers: nothing that they see is different, wherever their queues are."""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pvdrivers.cli.stats import snapshot
from pvdrivers.frontends.netfront import CSUM_BLANK, CSUM_VALID, Frame
from pvdrivers.frontends.netfront_keys import Wishes
from rings.netif import GSO_TCPV4

from . import test_limit, test_live, test_staging, test_switch, test_together, test_vlan, test_waiting
from .conftest import Guest, until
from .control_bed import KEY
from .packets import cut, tcp
from .test_capture import Capture, packets
from .test_switch import EVERYBODY, nothing_came, udp
from .test_vlan import tagged

pytestmark = pytest.mark.jit_only("a real daemon serves")
_names = itertools.count()


def switch() -> str:
    """One that nobody has been on: its first guest is in its first shard."""
    return f"switch:s{next(_names)}"


def apart(net: Any, **options: Any) -> tuple[Guest, Guest]:
    """Two guests of one queue, in different shards."""
    name = switch()
    return net.guest(name, queues=1), net.guest(name, queues=1, **options)


def flow(src: Guest, dst: Guest | bytes, port: int, payload: bytes) -> bytes:
    """An IPv4 packet with UDP of a flow."""
    size = (28 + len(payload)).to_bytes(2, "big")
    ip = bytes([0x45, 0]) + size + bytes([0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2])
    return src.frame(dst, ip + port.to_bytes(2, "big") + bytes(6) + payload, 0x800)


def some(guest: Guest, queue: int, wait: float) -> list[bytes]:
    """What is there, or comes first."""
    try:
        return [frame.data for frame in guest.vif.receive_all(64, wait, queue=queue)]
    except TimeoutError:
        return []


def drain(guest: Guest, queue: int = 0, wait: float = 0.2) -> list[bytes]:
    """All, until nothing comes, nor is counted as on its way."""
    found: list[bytes] = []
    while True:
        counted = guest.counted("received")
        try:
            while True:
                found += [frame.data for frame in guest.vif.receive_all(64, wait, queue=queue)]
        except TimeoutError:
            if guest.counted("received") == counted:
                return found


@pytest.mark.parametrize(
    "test",
    [
        lambda net: test_switch.test_what_one_sends_the_other_gets(net, True),
        test_switch.test_all_of_many_arrive_in_order,
        test_switch.test_who_gets_what,
        test_switch.test_an_address_is_learned_and_moves_but_nobody_takes_that_of_a_vif,
        test_switch.test_a_receiver_that_takes_nothing_loses_packets_and_nobody_else_does,
        test_switch.test_null,
        lambda net: test_switch.test_checksums(net, 1000),
        test_switch.test_segments_go_as_one_packet_to_who_takes_them,
        test_switch.test_queues,
        test_switch.test_a_killed_daemon_is_not_noticed,
        test_switch.test_a_guest_that_goes_while_it_receives,
        test_live.test_a_guest_gets_of_groups_what_it_listens_to,
        lambda net: test_limit.test_the_rate_of_a_vif_with_four_queues(net, "from the guest"),
        lambda net: test_limit.test_the_rate_of_a_vif_with_four_queues(net, "to the guest"),
        lambda net: test_staging.test_every_byte_arrives_whoever_has_pages_mapped(net, (True, False)),
        test_vlan.test_guests_in_vlans,
        test_together.test_segments_for_a_trunk,
    ],
)
def test_as_with_one_worker(several: Any, test: Callable[[Any], None]) -> None:
    test(several)


def test_all_sizes_go_from_shard_to_shard(several: Any) -> None:
    a, b = apart(several)
    for size in (14, 60, 127, 128, 129, 1514, 4095, 4096, 4097, 9014, 65535):
        for sender, receiver in ((a, b), (b, a)):
            frame = sender.frame(receiver, os.urandom(size - 14))
            sender.vif.send(frame)
            assert receiver.vif.receive(5) == frame
    assert a.counted("sent") == b.counted("received") == 11
    assert a.counted("link full") == b.counted("link full") == 0


def test_a_flow_keeps_its_order(several: Any) -> None:
    """Two queues each; every flow from either of them, both ways at once."""
    name = switch()
    a, b = net = (several.guest(name, queues=2), several.guest(name, queues=2))
    heard: list[list[bytes]] = [[] for _ in range(4)]
    over = threading.Event()

    def receive(guest: int) -> None:  # one thread a vif: its buffers are for all of its queues
        while not over.is_set():
            for queue in range(2):
                heard[2 * guest + queue] += some(net[guest], queue, 0.01)

    threads = [threading.Thread(target=receive, args=(guest,)) for guest in range(2)]
    for thread in threads:
        thread.start()
    try:
        for start in range(0, 1200, 8):
            for sender, receiver in ((a, b), (b, a)):
                for queue in range(2):
                    sender.vif.send_all(
                        [
                            Frame(flow(sender, receiver, 2 * (k % 4) + queue, k.to_bytes(4, "big") * 50))
                            for k in range(start, start + 8)
                        ],
                        queue=queue,
                    )
        until(lambda: sum(map(len, heard)) >= 2 * 2 * 1200)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    for k in range(0, 4, 2):
        by_flow: dict[int, list[int]] = {}
        for got in heard[k : k + 2]:
            here = {int.from_bytes(data[34:36], "big") for data in got}
            assert not here & set(by_flow)  # each in one queue
            for data in got:
                by_flow.setdefault(int.from_bytes(data[34:36], "big"), []).append(int.from_bytes(data[42:46], "big"))
        assert by_flow == {
            2 * f + q: [k for k in range(1200) if k % 4 == f] for f in range(4) for q in range(2)
        }  # fmt: skip


def test_a_flood_comes_once_to_everybody_else(several: Any) -> None:
    name = switch()
    guests = [several.guest(name, queues=n) for n in (2, 1, 1, 2, 3)]
    number = itertools.count()
    sent: dict[int, list[bytes]] = {k: [] for k in range(len(guests))}
    for k, sender in enumerate(guests):
        for queue in range(len(sender.vif.queues)):
            for to in (EVERYBODY, b"\x01\0\x5e\0\0\1", b"\2unknw"):
                for size in (0, 5000):
                    frame = flow(sender, to, next(number), os.urandom(size))
                    sender.vif.send(frame, queue=queue)
                    sent[k].append(frame)
    total = sum(map(len, sent.values()))
    for k, receiver in enumerate(guests):
        until(partial(lambda guest, count: guest.counted("received") == count, receiver, total - len(sent[k])))
        got = Counter(itertools.chain(*(drain(receiver, q) for q in range(len(receiver.vif.queues)))))
        assert got == Counter(itertools.chain(*(frames for s, frames in sent.items() if s != k)))


def test_segments_and_checksums_for_who_takes_them_and_who_does_not(several: Any) -> None:
    name = switch()
    a, b = several.guest(name, queues=1), several.guest(name, queues=1)
    several.guest(name, queues=1)
    c = several.guest(name, queues=1, wishes=Wishes(gso=False, csum4=False))
    payload = os.urandom(30_000)
    whole = tcp(4, payload, macs=b.mac + a.mac)
    a.vif.send_all([Frame(whole, CSUM_BLANK, 1448, GSO_TCPV4)])
    assert b.vif.receive_all(1, 5) == [Frame(whole, CSUM_BLANK, 1448, GSO_TCPV4)]
    a.vif.send_all([Frame(tcp(4, payload, macs=c.mac + a.mac), CSUM_BLANK, 1448, GSO_TCPV4)])
    segments = cut(4, payload, 1448, macs=c.mac + a.mac, blank=False)
    got: list[Frame] = []
    while len(got) < len(segments):
        got += c.vif.receive_all(64, 5)
    assert [(frame.data, frame.csum) for frame in got] == [(one, CSUM_VALID) for one in segments]
    assert c.counted("cut") == 1
    blank, complete = udp(os.urandom(8001))
    for to, data, csum in ((b, blank, CSUM_BLANK), (c, complete, CSUM_VALID)):
        a.vif.send(a.frame(to, blank, 0x800), csum=CSUM_BLANK)
        assert to.vif.receive_all(1, 5) == [Frame(a.frame(to, data, 0x800), csum)]


def test_a_tag_on_the_other_side(several: Any) -> None:
    name = switch()
    a, trunk = several.guest(f"{name};vlan=5", queues=1), several.guest(f"{name};trunk", queues=1)
    b, other = several.guest(f"{name};vlan=5", queues=1), several.guest(f"{name};vlan=6", queues=1)
    c = several.guest(f"{name};vlan=5", queues=1)
    for size in (20, 130, 5000, 65000):
        frame = a.frame(EVERYBODY, os.urandom(size))
        a.vif.send(frame)
        assert b.vif.receive(5) == c.vif.receive(5) == frame
        assert trunk.vif.receive(5) == tagged(frame, 5)
        frame = trunk.frame(EVERYBODY, os.urandom(size))
        trunk.vif.send(tagged(frame, 5))
        assert a.vif.receive(5) == b.vif.receive(5) == c.vif.receive(5) == frame
    nothing_came(other)


@pytest.mark.parametrize("queue", [0, 1])
def test_a_mapping_names_a_queue_of_the_other_shard(several: Any, queue: int) -> None:
    name = switch()
    a, b = several.guest(name, queues=2), several.guest(name, queues=2)
    b.vif.set_hash(KEY, mapping=(queue,))
    sent = [flow(a, b, port, bytes(size)) for port in range(20) for size in (10, 5000)]
    for frame in sent:
        for sender in range(2):
            a.vif.send(frame, queue=sender)
    until(lambda: b.counted("received") == 2 * len(sent))
    assert drain(b, 1 - queue) == []
    assert Counter(drain(b, queue)) == Counter(sent * 2)


def test_pages_of_both_queues_are_kept_mapped(several: Any) -> None:
    """What the control ring is asked for the second queue is done by that one's worker."""
    name = switch()
    a, b = several.guest(name, queues=2), several.guest(name, queues=2)
    (found,) = [d for d in snapshot(several.run_dir) if d["device"] == a.name]
    assert [q["persistent_held"] for q in found["queues"]] == [512, 512]
    for k in range(40):
        frame = flow(a, b, k, os.urandom(k * 200))
        a.vif.send(frame, queue=k & 1)
        until(partial(lambda count: b.counted("received") == count, k + 1))
        got: list[bytes] = []  # it is counted before its ring says so
        until(partial(lambda got: got.extend(some(b, 0, 0.01) + some(b, 1, 0.01)) or got, got))
        assert got == [frame]


def test_an_address_that_moves_between_shards(several: Any) -> None:
    """To and fro, with others asking from either shard; and one that is learned behind both queues of a guest."""
    name = switch()
    a, b, c, d = (several.guest(name, queues=1) for _ in range(4))
    inner = b"\2inner"
    for home, strangers in itertools.islice(itertools.cycle(((b, (c,)), (c, (b,)), (a, (b, c)))), 9):
        home.vif.send(EVERYBODY + inner + b"\x88\xb5hello")
        for guest in (a, b, c, d):
            if guest is not home:
                assert guest.vif.receive(5)[6:12] == inner
        for sender in (guest for guest in (d, a, b, c) if guest is not home):
            sender.vif.send(sender.frame(inner, b"to inner"))
            assert home.vif.receive(5) == sender.frame(inner, b"to inner")
        for stranger in strangers:
            nothing_came(stranger)


def test_a_capture_of_queues_of_two_workers(several: Any, tmp_path: Path) -> None:
    name = switch()
    a, b = several.guest(name, queues=2), several.guest(name, queues=2)
    capture = Capture(a, tmp_path / "a.pcapng", "--snaplen", "100")
    frames = [[flow(a, b, 2 * k + q, k.to_bytes(4, "big") * 100) for k in range(300)] for q in range(2)]

    for k in range(0, 300, 10):
        for queue in range(2):
            a.vif.send_all([Frame(one) for one in frames[queue][k : k + 10]], queue=queue)
    until(lambda: a.counted("sent") == 600)
    said = re.match(r"(\d+) packets, (\d+) lost", capture.end())
    assert said
    count, lost = map(int, said.groups())
    assert count + lost == 600 and count > 300  # one that finds the other's worker asleep at the ring gives up
    got = packets(capture.out)
    assert len(got) == count
    for queue in range(2):
        sent = iter(one[:100] for one in frames[queue])
        assert all(data in sent for interface, data, _, _ in got if interface == queue), "in order, and none twice"


def test_who_goes_and_comes_under_traffic_harms_nobody(several: Any) -> None:
    """Two have a queue in each shard and go on; others are there and gone, with one queue, two and three."""
    name = switch()
    a, b = several.guest(name, queues=2), several.guest(name, queues=2)
    over = threading.Event()
    heard = Counter[int]()

    def send() -> None:
        for queue in itertools.cycle((0, 1)):
            if over.is_set():
                return
            a.vif.send_all([Frame(flow(a, EVERYBODY, k, bytes(3000))) for k in range(8)], timeout=5, queue=queue)
            time.sleep(0.01)  # a worker without its processor for half a second finds room on its link

    def receive() -> None:
        while not over.is_set():
            for queue in range(2):
                heard[queue] += len(some(b, queue, 0.2))

    threads = [threading.Thread(target=call) for call in (send, receive)]
    for thread in threads:
        thread.start()
    try:
        for k in range(6):
            guest = several.guest(name, queues=1 + k % 3)
            time.sleep(0.1)
            guest.end()
            several.guests.remove(guest)
            for queue in range(2):
                until(partial(lambda queue, before: heard[queue] > before, queue, heard[queue]))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert a.said() == b.said() == ""
    assert a.counted("link full") == 0


def test_what_waits_in_one_shard_delays_nobody_in_the_other(several: Any) -> None:
    name = switch()
    a, b = several.guest(name, queues=1), several.guest(name, queues=1)
    c, d = several.guest(name, queues=1), several.guest(name, queues=1)
    full = test_waiting.fill(a, b)
    for sender, receiver in ((a, c), (a, d), (c, d), (d, c)):
        sender.vif.send(sender.frame(receiver, b"go on"))
        assert receiver.vif.receive(5) == sender.frame(receiver, b"go on")
    assert set(drain(b)) == {full}
