"""Transactions of several threads by one client: one at a time, as xenstored lets a domain have ten."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pvdrivers.xenstore import XenStoreClient, XenStoreError


@pytest.fixture
def domu(served: Any) -> Iterator[XenStoreClient]:
    """A client that has a domU's quota: ten transactions."""
    with served.client() as dom0, served.guest(5) as store:
        dom0.mkdir("/local/domain/5")
        dom0.set_perms("/local/domain/5", ["n5"])
        yield store


def run_threads(job: Callable[[int], None], count: int) -> None:
    """Raises what one of them raised."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(job, range(count)))


def test_many_threads_keep_to_the_quota_of_one_domain(domu: XenStoreClient) -> None:
    most, inside = [0], set()

    def job(n: int) -> None:
        def write(tx: int) -> None:
            inside.add(n)
            most[0] = max(most[0], len(inside))
            time.sleep(0.01)
            domu.write(f"n{n}", n, tx)
            inside.discard(n)

        domu.transaction(write)

    run_threads(job, 20)
    assert most == [1] and set(domu.ls("/local/domain/5") or ()) == {f"n{n}" for n in range(20)}


def test_who_must_not_wait_has_a_transaction_beside_them(domu: XenStoreClient) -> None:
    """And one thread may have one within another."""
    inside, end = threading.Event(), threading.Event()

    def long(tx: int) -> None:
        domu.transaction(lambda tx: domu.write("inner", "1", tx))
        inside.set()
        assert end.wait(10)

    thread = threading.Thread(target=domu.transaction, args=(long,))
    thread.start()
    assert inside.wait(10)
    domu.transaction(lambda tx: domu.write("beside", "1", tx), wait=False)
    end.set()
    thread.join()
    assert domu.read("inner") == domu.read("beside") == b"1"


def test_who_meets_conflicts_lets_the_others_have_their_turn(domu: XenStoreClient) -> None:
    """Else it would hold up all of them for as long as somebody writes what it reads."""
    done, tries = threading.Event(), []

    def conflicts(tx: int) -> None:
        domu.read("x", tx)
        tries.append(tx)
        if not done.is_set():
            domu.write("x", len(tries))

    thread = threading.Thread(target=domu.transaction, args=(conflicts,), kwargs={"tries": 1 << 20})
    thread.start()
    domu.transaction(lambda tx: domu.write("y", "1", tx))
    done.set()
    thread.join(10)
    assert not thread.is_alive() and domu.read("y") == b"1"


def test_a_connection_that_is_lost_in_a_transaction_holds_up_nobody(served: Any) -> None:
    store = served.guest(5)
    inside = threading.Event()

    def fails(tx: int) -> None:
        inside.set()
        time.sleep(0.05)  # the others wait by now
        served.close()
        store.read("x", tx)

    failed = []

    def job(n: int) -> None:
        if n:
            assert inside.wait(10)
        with pytest.raises(XenStoreError) as caught:
            store.transaction(fails if n == 0 else lambda tx: None)
        failed.append(caught.value.errno)

    with store:
        run_threads(job, 5)
    assert failed == [errno.ECONNRESET] * 5
