"""Event channels between processes: states, restarts, storms, limits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pvdrivers.errors import PlatformError
from pvdrivers.sim import wire

CLOSED, UNBOUND, INTERDOMAIN = wire.EVTCHNSTAT_closed, wire.EVTCHNSTAT_unbound, wire.EVTCHNSTAT_interdomain


def test_status_of_both_ends(dom0: Any, guest: Any) -> None:
    front, back = guest.open_events(), dom0.open_events()
    port = front.alloc_unbound(0)
    assert front.status(port) == (UNBOUND, 0, 0)
    ours = back.bind_interdomain(guest.domid, port)
    assert front.status(port) == (INTERDOMAIN, 0, ours)
    assert back.status(ours) == (INTERDOMAIN, guest.domid, port)
    back.unbind(ours)
    assert front.status(port) == (UNBOUND, 0, 0)
    assert back.status(ours) == (CLOSED, 0, 0)
    front.notify(port)  # nobody is there: no error
    front.close()
    back.close()


def test_the_allocator_goes_first(dom0: Any, guest: Any) -> None:
    front, back = guest.open_events(), dom0.open_events()
    port = front.alloc_unbound(0)
    ours = back.bind_interdomain(guest.domid, port)
    front.unbind(port)
    assert back.status(ours) == (UNBOUND, guest.domid, 0)
    back.notify(ours)
    front.close()
    back.close()


def test_a_port_number_is_used_again_without_its_events(dom0: Any, guest: Any) -> None:
    front, back = guest.open_events(), dom0.open_events()
    port = front.alloc_unbound(0)
    ours = back.bind_interdomain(guest.domid, port)
    back.notify(ours)
    front.unbind(port)
    assert front.alloc_unbound(0) == port
    assert front.pending() == []
    front.close()
    back.close()


@pytest.mark.parametrize("abi", ["2l", "fifo"])
def test_a_backend_is_killed_and_another_binds(run_dir: Path, join: Callable[..., Any], domain: Any, abi: str) -> None:
    front = join(domain, abi=abi).open_events()
    port = front.alloc_unbound(0)
    for _ in range(2):
        command = [sys.executable, "-m", "tests.sim.child", "bind", os.fspath(run_dir), str(domain.domid), str(port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as backend:
            assert backend.stdout is not None and backend.stdout.readline() == b"bound\n"
            assert front.wait(10) == [port]  # it answers the event that comes with binding
            for _ in range(20):
                front.notify(port)
                assert front.wait(10) == [port]
            backend.kill()
            backend.wait()
        front.notify(port)
        join().close()  # by now the dead are buried
        assert front.status(port)[0] == UNBOUND
    front.close()


def test_what_was_sent_before_binding_is_seen(dom0: Any, guest: Any) -> None:
    front, back = guest.open_events(), dom0.open_events()
    port = front.alloc_unbound(0)
    front.notify(port)
    ours = back.bind_interdomain(guest.domid, port)
    assert back.wait(5) == [ours]
    front.close()
    back.close()


def test_masked_ports_wait(dom0: Any, guest: Any) -> None:
    front, back = guest.open_events(), dom0.open_events()
    ports = [front.alloc_unbound(0) for _ in range(3)]
    ours = [back.bind_interdomain(guest.domid, port) for port in ports]
    back.pending()
    back.mask(ours[1])
    for port in ports:
        front.notify(port)
    assert sorted(back.wait(5)) == sorted([ours[0], ours[2]])
    back.unmask(ours[1])
    assert back.wait(5) == [ours[1]]
    front.close()
    back.close()


def test_priorities(dom0: Any, join: Callable[..., Any], domain: Any) -> None:
    guest = join(domain, abi="fifo")
    front, back = guest.open_events(), dom0.open_events()
    ports = [front.alloc_unbound(0) for _ in range(16)]
    ours = [back.bind_interdomain(domain.domid, port) for port in ports]
    for priority, port in enumerate(ports):
        front.set_priority(port, 15 - priority)
    for port in ours:
        back.notify(port)
    assert front.wait(5) == ports[::-1]
    for wrong in (-1, 16):
        with pytest.raises(PlatformError):
            front.set_priority(ports[0], wrong)
    with pytest.raises(PlatformError):
        back.set_priority(ours[0], 3)  # the 2-level ABI has none
    front.close()
    back.close()


def test_a_storm_loses_nothing(dom0: Any, guest: Any) -> None:
    """The last state a notifier announced is always seen, whatever was coalesced on the way."""
    front, back = guest.open_events(), dom0.open_events()
    port = front.alloc_unbound(0)
    ours = back.bind_interdomain(guest.domid, port)
    back.wait(5)
    announced, seen, wakes = [0], 0, 0

    def storm() -> None:
        for i in range(1, 5001):
            announced[0] = i
            front.notify(port)

    thread = threading.Thread(target=storm)
    thread.start()
    while seen < 5000:
        assert back.wait(10) == [ours]
        wakes += 1
        seen = announced[0]
    thread.join()
    assert wakes <= 5001
    front.close()
    back.close()


def test_the_limit_of_the_2_level_abi(join: Callable[..., Any], domain: Any) -> None:
    """4096 ports, of which 0 is none; the hypervisor makes no eventfds before somebody asks for them."""
    guest = join(domain)
    ports = [guest.hypercalls.call(wire.EVTCHN_ALLOC_UNBOUND, 0).values[0] for _ in range(4095)]
    assert sorted(ports) == list(range(1, 4096))
    with pytest.raises(PlatformError, match="FIFO"):
        guest.hypercalls.call(wire.EVTCHN_ALLOC_UNBOUND, 0)
    guest.hypercalls.call(wire.EVTCHN_CLOSE, 1234)
    assert guest.hypercalls.call(wire.EVTCHN_ALLOC_UNBOUND, 0).values[0] == 1234
    fifo = join(domain, abi="fifo")
    assert fifo.hypercalls.call(wire.EVTCHN_ALLOC_UNBOUND, 0).values[0] == 4096


def test_an_unknown_abi(join: Callable[..., Any]) -> None:
    with pytest.raises(PlatformError, match="3l"):
        join(abi="3l")
