"""One netfront, several threads: a queue each, or one for two."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from pvdrivers.frontends.netfront import Frame

from .conftest import Guest, until
from .test_shards import flow

pytestmark = pytest.mark.jit_only("a real daemon serves")

PORTS = 8


def packets(a: Guest, b: Guest, queue: int) -> list[Frame]:
    """UDP of some flows, of another size in each queue; every byte of a payload is the same, and names the queue."""
    found = []
    for port in range(PORTS):
        size = 1400 if queue == 0 else 200
        found.append(Frame(flow(a, b, 1000 + port, bytes([queue + 1]) * size)))
    return found


def is_whole(frame: Frame) -> bool:
    payload = frame.data[42:]
    return len(payload) == (1400 if payload[:1] == b"\1" else 200) and payload == payload[:1] * len(payload)


def test_a_thread_for_each_queue(net: Any) -> None:
    """What one sends or receives is not mixed up with what another does at the same time."""
    a, b = net.guest(queues=2), net.guest(queues=2)
    over = threading.Event()
    wrong: list[Frame] = []
    counts = [0, 0]

    def send(queue: int) -> None:
        batch = packets(a, b, queue)
        while not over.is_set():
            a.vif.send_all(batch, timeout=10, queue=queue)

    def receive(queue: int) -> None:
        while not over.is_set():
            try:
                got = b.vif.receive_all(64, 0.1, queue=queue)
            except TimeoutError:
                continue
            counts[queue] += len(got)
            wrong.extend(frame for frame in got if not is_whole(frame))

    threads = [threading.Thread(target=call, args=(queue,)) for call in (send, receive) for queue in range(2)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: min(counts) > 3000 or wrong, 60)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[0].data[:60]


def wait_for_one(guest: Guest, queue: int, failed: list[OSError]) -> None:
    try:
        guest.vif.receive(30, queue=queue)
    except OSError as error:
        failed.append(error)


class Watched:
    """The epoll of a queue, and how many threads waited for it when it was closed."""

    def __init__(self, queue: Any) -> None:
        self._queue, self._epoll, self.waiting = queue, queue._epoll, -1
        queue._epoll = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)

    def close(self) -> None:
        self.waiting = self._queue._waiting
        self._epoll.close()


def test_closed_while_others_wait(net: Any) -> None:
    """They get an error; nothing that they wait on is taken away under them."""
    for _ in range(5):
        a = net.guest(queues=2)
        failed: list[OSError] = []
        threads = [threading.Thread(target=wait_for_one, args=(a, k % 2, failed)) for k in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        watched = [Watched(queue) for queue in a.vif.queues]
        net.guests.remove(a)
        a.end()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert len(failed) == 6 and not any(isinstance(error, TimeoutError) for error in failed)
        assert [one.waiting for one in watched] == [0, 0], "nobody, when it was closed"
