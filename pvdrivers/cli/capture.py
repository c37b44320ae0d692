"""``pvdrivers capture``: the packets of a vif of a running daemon, into a pcapng file.

What the daemon's worker has put into the ring is written here; neither waits for the other.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from pvdrivers import __version__, daemons, pcapng
from pvdrivers.capture_ring import DATA_AT, RECORD, RECORD_SIZE, SHARED, SKIP
from pvdrivers.errors import ConfigError, PlatformError, PvError
from pvdrivers.link import PACKET, send
from pvdrivers.report import SUFFIX
from pvdrivers.toolstack import VIF_KINDS
from rings.netif import GSO_TCPV6
from rings.vnet import CSUM_BLANK

_ENDS = (signal.SIGINT, signal.SIGTERM)
_IDLE_SECONDS = 0.02
_FLUSH_SECONDS = 0.5
_NAME = re.compile(rf"(?:({'|'.join(VIF_KINDS)})[-/]?)?(\d+)[./-](\d+)")


def run(args: argparse.Namespace) -> int:
    """Until SIGINT or SIGTERM, or as long as was asked for, or until the device or its daemon is gone."""
    match = _NAME.fullmatch(args.vif)
    if not match:
        raise ConfigError(f"{args.vif!r} is no vif: vif-DOMID-DEVID, as `pvdrivers stats` has them")
    name = _find(args.run_dir, match[1] or "vif", f"{match[2]}-{match[3]}")
    sock, fd = _ask(args.run_dir, name, args.buffer << 20, args.snaplen)
    with sock:
        try:
            ring = Ring(fd)
        finally:
            os.close(fd)
        with _output(args.out) as file:
            writer = Writer(file, name, args.snaplen)
            # Noted, not suffered: an exception within a packet would have it in the file twice, or in part. And not
            # blocked: the kernel would give it to another thread, numpy's for one.
            told: list[int] = []
            before = [(number, signal.signal(number, lambda n, _: told.append(n))) for number in _ENDS]
            try:
                _follow(sock, ring, writer, args, told)
            finally:
                if args.packets is None or writer.count < args.packets:
                    writer.packets(ring, args.packets)
                writer.end(ring)
                for number, handler in before:
                    signal.signal(number, handler)
    lost = int(ring.shared["lost"].sum())
    print(f"{writer.count} packets, {lost} lost for want of room", file=sys.stderr)
    return 0


def _find(run_dir: Path, kind: str, number: str) -> str:
    """The name of the device, of whatever kind it is there: a guest has one of a number. That of `kind` if none is."""
    there = set()
    for daemon in daemons.running(run_dir):
        there |= {said["device"] for said in daemons.read(run_dir, daemon, SUFFIX) or ()}
    names = [f"{one}-{number}" for one in (kind, *VIF_KINDS)]
    return next((name for name in names if name in there), names[0])


def _ask(run_dir: Path, name: str, size: int, snap: int) -> tuple[socket.socket, int]:
    """The daemon that has the device. Raises PvError with what each has to say."""
    there = daemons.running(run_dir)
    if not there:
        raise ConfigError(f"{run_dir}: no daemon runs there; name the directory of `pvdrivers serve` with --run-dir")
    why = ""
    for daemon in there:
        try:
            sock = daemons.connect(run_dir / "daemons" / f"{daemon.pid}.sock")
        except OSError as e:
            why = f"daemon {daemon.pid} cannot be asked: {e.strerror}"
            continue
        sock.settimeout(10)
        send(sock, do="capture", device=name, bytes=size, snap=snap)
        try:
            data, fds, _, _ = socket.recv_fds(sock, PACKET, 1)
            said: dict[str, Any] = json.loads(data) if data else {}
        except (OSError, ValueError):
            said, fds = {}, []
        if fds:
            sock.setblocking(False)
            return sock, fds[0]
        why = str(said.get("why") or f"daemon {daemon.pid} (version {daemon.version}) does not answer")
        sock.close()
    raise PvError(why)


def _output(path: str) -> IO[bytes]:
    if path == "-":
        return os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    try:
        return open(path, "wb")
    except OSError as e:
        raise PlatformError(f"{path}: {e.strerror}") from e


def _follow(sock: socket.socket, ring: Ring, writer: Writer, args: argparse.Namespace, told: list[int]) -> None:
    """Until `told` has a signal in it, or for another reason to end."""
    deadline = None if args.seconds is None else time.monotonic() + args.seconds
    print(f"capturing {writer.name}", file=sys.stderr, flush=True)
    while args.packets is None or writer.count < args.packets:
        if told:
            return
        if not writer.packets(ring, args.packets):
            writer.flush()
            time.sleep(_IDLE_SECONDS)
        if deadline is not None and time.monotonic() >= deadline:
            return
        try:
            if not sock.recv(1):
                print(f"{writer.name}: it is gone, or its daemon is", file=sys.stderr)
                return
        except BlockingIOError:
            pass


class Ring:
    """The reader's end of a capture ring."""

    def __init__(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        self._map = mmap.mmap(fd, size)
        self._size = size - DATA_AT - RECORD_SIZE  # with room for one that begins at the very end, and says SKIP
        self.shared: np.void = np.frombuffer(self._map, SHARED, 1)[0]
        self._read = 0

    def take(self) -> Iterator[tuple[np.void, bytes]]:
        """All that is there: a RECORD and its bytes. What was taken is given back when the next is asked for."""
        written = int(self.shared["written"])
        while self._read < written:
            at = DATA_AT + self._read % self._size
            record = np.frombuffer(self._map, RECORD, 1, at)[0].copy()
            if int(record["length"]) == SKIP:
                self._read += self._size - self._read % self._size
                self.shared["read"] = self._read
                continue
            length = int(record["length"])
            data = self._map[at + RECORD_SIZE : at + RECORD_SIZE + length]
            yield record, data
            self._read += RECORD_SIZE + (length + 7 & ~7)
            self.shared["read"] = self._read


class Writer:
    """The file: an interface a queue, in the order in which they are first seen."""

    def __init__(self, file: IO[bytes], name: str, snap: int) -> None:
        self.name, self.count = name, 0
        self._file, self._snap = file, snap
        self._interfaces: dict[int, int] = {}
        self._start = time.time_ns()
        self._offset = self._start - time.monotonic_ns()
        self._flushed = 0.0
        file.write(pcapng.section(f"pvdrivers {__version__}"))
        self._interface(0)

    def _interface(self, queue: int) -> int:
        if queue not in self._interfaces:
            self._interfaces[queue] = len(self._interfaces)
            text = f"queue {queue} of {self.name}; outbound is what the guest sends"
            self._file.write(pcapng.interface(f"{self.name}.q{queue}", text, self._snap))
        return self._interfaces[queue]

    def packets(self, ring: Ring, most: int | None = None) -> bool:
        """Write what is there; whether there was something."""
        before = self.count
        for record, data in ring.take():
            queue, gso = int(record["queue"]), int(record["gso_size"])
            said = []
            if gso:
                kind = "TCPv6" if int(record["gso_type"]) == GSO_TCPV6 else "TCPv4"
                said.append(f"GSO {kind}, segments of {gso} bytes")
            if int(record["csum"]) == CSUM_BLANK:
                said.append("checksum blank")
            self._file.write(
                pcapng.packet(
                    self._interface(queue), int(record["time"]) + self._offset, data, int(record["size"]),
                    flags=pcapng.OUTBOUND if record["outbound"] else pcapng.INBOUND, queue=queue,
                    comment="; ".join(said),
                )
            )  # fmt: skip
            self.count += 1
            if most is not None and self.count >= most:
                break
        return self.count > before

    def flush(self) -> None:
        """For who looks at the file meanwhile."""
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self._file.flush()

    def end(self, ring: Ring) -> None:
        """What was seen and what was lost, by interface."""
        now = time.time_ns()
        taken, lost = ring.shared["taken"].copy(), ring.shared["lost"].copy()
        for queue in range(len(lost)):
            if taken[queue] or lost[queue]:
                self._interface(queue)
        for queue, index in self._interfaces.items():
            received = int(taken[queue] + lost[queue])
            self._file.write(pcapng.statistics(index, self._start, now, received, int(lost[queue])))
        self._file.flush()
