"""XDP headroom, as Linux has it: bytes that are free before the data in each page, and what is said of them."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from typing import Any

import numpy as np
import pytest

from pvdrivers.errors import ConfigError
from pvdrivers.frontends.netfront import CSUM_BLANK, Frame
from pvdrivers.frontends.netfront_keys import Wishes
from rings import netif
from rings.ring import RING_END

from .conftest import Guest, until
from .control_bed import KEY
from .test_catalogue import produced
from .test_hostile import logged, talk

pytestmark = pytest.mark.jit_only("a real daemon serves")
WISHES = [Wishes(), Wishes(staging=False)]


def responses(guest: Guest, count: int) -> list[bytes]:
    """The next responses on the rx ring, as they stand there; nothing is taken."""
    end: Any = guest.vif.queues[0]._keep["rx_end"]
    assert end.dtype == RING_END
    return [
        ctypes.string_at(int(end[0]["slots"]) + ((int(end[0]["cons"]) + k) & 255) * 8, 8) for k in range(count)
    ]


@pytest.mark.parametrize("wishes", WISHES)
@pytest.mark.parametrize("headroom", [1, 256, 2048])
def test_every_byte_arrives(net: Any, wishes: Wishes, headroom: int) -> None:
    a, b = net.guest(wishes=wishes), net.guest(wishes=wishes)
    for bytes_free in (headroom, 0):
        b.vif.set_headroom(bytes_free)
        assert b.vif.state == 4
        for size in (14, 60, 128, 1514, 4095 - headroom, 4096 - headroom, 4097 - headroom, 4096, 9014, 65535):
            frame = a.frame(b, os.urandom(size - 14))
            a.vif.send(frame)
            assert b.vif.receive(5) == frame
    assert b.vif.connections == 1


@pytest.mark.parametrize("wishes", WISHES)
def test_what_is_on_the_ring_is_what_linux_writes(net: Any, wishes: Wishes) -> None:
    """xenvif_rx_data_slot: headroom first in each page, at offset 0, counted by status; its extra comes last."""
    a, b = net.guest(), net.guest(wishes=wishes)
    b.vif.set_headroom(256)
    b.vif.set_hash(KEY)
    payload = bytes(4) + os.urandom(4996)  # of no version of IP: b would be told its own hash of such a packet
    frame = Frame(a.frame(b, payload, 0x800), CSUM_BLANK, 1448, 1, netif.HASH_IPV4, 0x01020304)
    before = b.counted("received")
    queue = b.vif.queues[0]
    pages = int(queue.record[0]["rx_pages"])
    first = int(queue._keep["rx_end"][0]["cons"]) & 255
    ctypes.memset(pages + first * 4096, 0xEE, 4096)
    a.vif.send_all([frame])
    until(lambda: b.counted("received") == before + 1)
    until(lambda: produced(b, "rx_end") - int(queue._keep["rx_end"][0]["cons"]) == 5)  # which is a moment later
    said = responses(b, 5)
    one, two = np.frombuffer(said[0] + said[4], netif.RX_RESPONSE)
    blank = netif.RXF_csum_blank | netif.RXF_data_validated
    assert (one["offset"], one["flags"], one["status"]) == (
        0, blank | netif.RXF_more_data | netif.RXF_extra_info, 4096,
    )  # fmt: skip
    assert (two["offset"], two["flags"], two["status"]) == (0, 0, 256 + len(frame.data) - (4096 - 256))
    assert [extra[:2] for extra in said[1:4]] == [b"\x01\x01", b"\x04\x01", b"\x05\x00"]
    assert said[3][2:4] == (256).to_bytes(2, "little")
    page = ctypes.string_at(pages + first * 4096, 4096)
    assert page[:256] == b"\xee" * 256, "nothing is written there"
    assert page[256:] == frame.data[: 4096 - 256]
    assert b.vif.receive_all(1, 5) == [frame]


def test_who_takes_one_page_takes_less_of_it(net: Any) -> None:
    a, b = net.guest(), net.guest(wishes=Wishes(sg=False))
    b.vif.set_headroom(256)
    a.vif.send(a.frame(b, bytes(4096 - 256 - 14)))
    assert len(b.vif.receive(5)) == 4096 - 256
    a.vif.send(a.frame(b, bytes(4096 - 256 - 13)))
    until(lambda: b.counted("not accepted") == 1)


def test_under_traffic(net: Any) -> None:
    a, b = net.guest(), net.guest()
    frame = a.frame(b, os.urandom(3000))
    stop = threading.Event()
    done: list[int] = []

    def change() -> None:
        try:
            for n in range(10):
                b.vif.set_headroom(256 * (n % 3))
                done.append(n)
        finally:
            stop.set()

    thread = threading.Thread(target=change)
    thread.start()
    came = 0
    while not stop.is_set() or came == 0:
        a.vif.send(frame)
        assert b.vif.receive(5) == frame
        came += 1
    thread.join()
    assert len(done) == 10
    assert b.vif.stats()["rx_errors"] == 0


def test_it_is_asked_for_again_with_a_new_connection(net: Any) -> None:
    a, b = net.guest(), net.guest()
    b.vif.set_headroom(512)
    net.dom0.store.write(f"{b.backend}/state", "5")  # the backend closes
    until(lambda: b.vif.connections == 2 and b.vif.state == 4)
    a.vif.send(a.frame(b, bytes(100)))
    until(lambda: b.counted("received") == 1)
    assert responses(b, 2)[1][:4] == b"\x05\0" + (512).to_bytes(2, "little")
    assert b.vif.receive(5) == a.frame(b, bytes(100))


def test_what_cannot_be(net: Any) -> None:
    a, b, liar = net.guest(), net.guest(), net.guest()
    with pytest.raises(ConfigError, match="from 0 to 2048"):
        a.vif.set_headroom(2049)
    path = f"/local/domain/{liar.domain.domid}/device/vif/0"
    for text in ("4096", "32767", "-1", "x"):
        connections = liar.vif.connections
        liar.platform.store.write(f"{path}/{netif.KEY_REQUEST_XDP_HEADROOM}", text)
        liar.platform.store.write(f"{path}/state", 7)
        until(lambda: liar.vif.connections > connections and liar.vif.state == 4)  # noqa: B023
    assert "not from 0 to 2048" in logged(liar)
    assert "not a number" in logged(liar)
    talk(a, b)
    none = net.guest()
    object.__setattr__(none.vif.offer, "headroom", False)
    with pytest.raises(OSError) as caught:
        none.vif.set_headroom(256)
    assert caught.value.errno == errno.EOPNOTSUPP
