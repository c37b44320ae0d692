"""Any bytes on the hypercall socket are answered with an errno; others do not notice."""

from __future__ import annotations

import array
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvdrivers.sim import toolstack, wire


def connect(run_dir: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(10)
    sock.connect(os.fspath(run_dir / wire.SOCKET))
    return sock


def ask(sock: socket.socket, message: bytes) -> tuple[int, list[int]]:
    """(status, number of descriptors) of the answer; the descriptors are closed."""
    sock.send(message)
    answer, ancillary, _, _ = sock.recvmsg(wire.LARGEST_REPLY, socket.CMSG_SPACE(64))
    fds = array.array("i")
    for _, _, data in ancillary:
        fds.frombytes(data)
    for fd in fds:
        os.close(fd)
    status: int = wire.REPLY.unpack_from(answer)[0]
    return status, list(fds)


def hello(domain: toolstack.Domain, flags: int = 0, limit: int = wire.PORTS_2L) -> bytes:
    return wire.REQUEST.pack(wire.HELLO, wire.VERSION, domain.domid, flags, limit, 0, 0, 0) + domain.token


@pytest.fixture
def stranger(run_dir: Path) -> Iterator[socket.socket]:
    with connect(run_dir) as sock:
        yield sock


@pytest.mark.parametrize("op", range(2, 24))
def test_nothing_before_hello(stranger: socket.socket, op: int) -> None:
    assert ask(stranger, wire.REQUEST.pack(op, *[0] * 7)) == (-errno.EPERM, [])


@pytest.mark.parametrize("length", [1, 4, 31, wire.LARGEST_REQUEST + 1, 60000])
def test_messages_of_a_wrong_size(stranger: socket.socket, domain: toolstack.Domain, length: int) -> None:
    assert ask(stranger, bytes(length)) == (-errno.EMSGSIZE, [])
    assert ask(stranger, hello(domain))[0] == 0
    assert ask(stranger, bytes(length)) == (-errno.EMSGSIZE, [])


def test_hello_with_wrong_arguments(stranger: socket.socket, domain: toolstack.Domain) -> None:
    pack = wire.REQUEST.pack
    assert ask(stranger, pack(wire.HELLO, 2, domain.domid, 0, 4096, 0, 0, 0))[0] == -errno.EPROTONOSUPPORT
    assert ask(stranger, hello(domain, flags=8))[0] == -errno.EINVAL
    assert ask(stranger, hello(domain, limit=5))[0] == -errno.EINVAL
    assert ask(stranger, hello(domain))[0] == 0
    assert ask(stranger, hello(domain))[0] == -errno.EISCONN


def test_descriptors_in_a_request_are_dropped(stranger: socket.socket, domain: toolstack.Domain) -> None:
    read, write = os.pipe()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write]))]
    stranger.sendmsg([hello(domain)], rights)
    assert wire.REPLY.unpack_from(stranger.recv(wire.LARGEST_REPLY))[0] == 0
    os.close(write)
    assert os.read(read, 1) == b""  # nobody else holds it
    os.close(read)


def test_a_guest_has_so_many_handles(run_dir: Path, domain: toolstack.Domain) -> None:
    socks = [connect(run_dir) for _ in range(257)]
    statuses = [ask(sock, hello(domain))[0] for sock in socks]
    assert statuses == [0] * 256 + [-errno.EUSERS]
    for sock in socks:
        sock.close()


def test_ports_of_another_handle(run_dir: Path, domain: toolstack.Domain) -> None:
    with connect(run_dir) as one, connect(run_dir) as two:
        for sock in (one, two):
            assert ask(sock, hello(domain))[0] == 0
        one.send(wire.REQUEST.pack(wire.EVTCHN_ALLOC_UNBOUND, 0, *[0] * 6))
        port = wire.REPLY.unpack_from(one.recv(wire.LARGEST_REPLY))[1]
        for op in (wire.EVTCHN_CLOSE, wire.EVTCHN_FDS):
            assert ask(two, wire.REQUEST.pack(op, port, *[0] * 6)) == (-errno.EPERM, [])
            assert ask(two, wire.REQUEST.pack(op, port + 1, *[0] * 6)) == (-errno.ENOENT, [])
        assert len(ask(one, wire.REQUEST.pack(wire.EVTCHN_FDS, port, *[0] * 6))[1]) == 2


words = st.one_of(
    st.integers(0, 40), st.sampled_from([0x7FF0, 0xFFFF, 1 << 31, (1 << 32) - 1]), st.integers(0, 2**32 - 1)
)


@given(messages=st.lists(
    st.one_of(
        st.binary(max_size=400),
        st.builds(lambda op, args, tail: wire.REQUEST.pack(op, *args) + tail, st.integers(0, 24),
                  st.lists(words, min_size=7, max_size=7), st.binary(max_size=64)),
    ), max_size=30))  # fmt: skip
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_bytes_from_a_guest(run_dir: Path, dom0: Any, messages: list[bytes]) -> None:
    domain = toolstack.create_domain(dom0, memory_mib=1, grants=64)
    with connect(run_dir) as sock:
        assert ask(sock, hello(domain))[0] == 0
        for message in messages:
            if message:
                status, fds = ask(sock, message)
                assert status <= 0
                assert not (status and fds)
    assert dom0.domain_uuid(0)


def test_the_dead_leave_nothing_behind(run_dir: Path, dom0: Any) -> None:
    """After all of that, the hypervisor holds descriptors of what is alive, and of nothing else."""
    for _ in range(3):
        domain = toolstack.create_domain(dom0, memory_mib=1)
        with connect(run_dir) as sock:
            assert ask(sock, hello(domain, flags=wire.WANT_MEMORY | wire.WANT_STORE))[0] == 0
            sock.send(wire.REQUEST.pack(wire.EVTCHN_ALLOC_UNBOUND, 0, *[0] * 6))
            port = wire.REPLY.unpack_from(sock.recv(wire.LARGEST_REPLY))[1]
            ask(sock, wire.REQUEST.pack(wire.EVTCHN_FDS, port, *[0] * 6))
        bury(run_dir)
        assert dom0.domain_uuid(domain.domid) == ""
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _is_sim(p, run_dir)]
    assert len(pids) == 1

    def count() -> int:
        domain = toolstack.create_domain(dom0, memory_mib=1)
        with connect(run_dir) as sock:
            ask(sock, hello(domain, flags=wire.WANT_MEMORY | wire.WANT_STORE))
        bury(run_dir)
        return len(os.listdir(f"/proc/{pids[0]}/fd"))

    # Connections of tests before this one may be on their way out still; a leak would go on growing.
    counts = [count(), count()]
    deadline = time.monotonic() + 10
    while counts[-1] > counts[-2] and time.monotonic() < deadline:
        time.sleep(0.05)
        counts.append(count())
    assert counts[-1] <= counts[-2], counts


def bury(run_dir: Path) -> None:
    """Whoever hung up before a hello is gone when it is answered."""
    with connect(run_dir) as sock:
        ask(sock, wire.REQUEST.pack(wire.HELLO, wire.VERSION, 0, 0, wire.PORTS_2L, 0, 0, 0))


def _is_sim(process: Path, run_dir: Path) -> bool:
    try:
        return os.fspath(run_dir).encode() in (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
