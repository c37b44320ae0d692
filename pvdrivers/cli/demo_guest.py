"""A guest of the demonstration that has a vif and talks to another: by TCP if it can have a network namespace.

First line: run_dir, domid, token, links (which to try: "tap", "veth"), address. The answer to {} says which link there
is, "" for none, and why. Then, on both guests: {"talk": {"seconds", "peer", "port", "first", "tcp"}}: they send to each
other, and compare every byte; by TCP, or without a link by packets of netfront's API, of which each lot is waited for.
"""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pvdrivers import interfaces
from pvdrivers.bench.agent import Answer, answer
from pvdrivers.errors import PlatformError

from . import namespace

__all__ = ["main"]

_CONNECT = 60.0
_PATIENCE = 120.0  # seconds: a backend that is killed has to come again meanwhile
_BLOCK = 1 << 18
_LOT, _PAYLOAD, _KIND = 32, 1400, b"\x88\xb5"  # packets that are waited for together; an experimental Ethernet type
_AGAIN = 0.3  # seconds without an answer


def _block(port: int) -> bytearray:
    """What is sent over and over, the first eight bytes counting: everybody can make it."""
    return bytearray(random.Random(port).randbytes(_BLOCK))


def _numbered(block: bytearray, number: int) -> bytearray:
    block[:8] = number.to_bytes(8, "big")
    return block


class _Guest:
    def __init__(self, setup: dict[str, Any]) -> None:
        self.link, self.why = "", ""
        self._tap: Any = None
        if setup["links"]:
            try:
                namespace.enter()
                interfaces.up("lo")
            except (PlatformError, OSError) as e:
                self.why, setup["links"] = str(e), []
        # Not before: numpy has threads.
        from pvdrivers.frontends import netfront_tap
        from pvdrivers.frontends.netfront import Netfront
        from pvdrivers.platform import open_platform

        netfront_tap.warm()
        run_dir, token = Path(setup["run_dir"]), bytes.fromhex(setup["token"])
        self.platform = open_platform("sim", run_dir=run_dir, domid=setup["domid"], token=token)
        self.vif = Netfront(self.platform, 0)
        self.vif.connect(_CONNECT)
        for link in setup["links"]:
            try:
                self._tap = {"tap": self._with_tap, "veth": self._with_veth}[link]()
                interfaces.set_address("eth0", setup["address"])
                self.link, self.why = link, ""
                return
            except (PlatformError, OSError) as e:
                self.why = str(e)

    def _with_tap(self) -> Any:
        from pvdrivers.frontends.netfront_tap import Tap

        return Tap(self.vif, "eth0")

    def _with_veth(self) -> Any:
        from pvdrivers.frontends.netfront_veth import Veth

        namespace.make_veth("eth0", "vif0")
        interfaces.set_hardware_address("eth0", self.vif.mac)
        interfaces.up("vif0")
        interfaces.up("eth0")
        return Veth(self.vif, "eth0", "vif0")

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        if "talk" not in command:
            return {"link": self.link, "why": self.why, "mac": self.vif.mac.hex(":")}
        talk = command["talk"]
        return self._tcp(**talk) if talk["tcp"] else self._packets(**talk)

    # TCP

    def _tcp(self, seconds: float, peer: str, port: int, first: bool, tcp: bool) -> dict[str, Any]:
        """One connection, which the first makes; both send for so long, then say that it was all."""
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(_to(peer, port) if first else _from(port))
            sock.settimeout(_PATIENCE)
            found: dict[str, Any] = {"right": True, "received": 0}
            receiver = threading.Thread(target=_hear, args=(sock, port, found), daemon=True)
            receiver.start()
            began, sent, block = time.monotonic(), 0, _block(port)
            while time.monotonic() - began < seconds:
                sock.sendall(_numbered(block, sent // _BLOCK))
                sent += _BLOCK
            sock.shutdown(socket.SHUT_WR)
            receiver.join(_PATIENCE)
            if receiver.is_alive():
                raise TimeoutError("the other guest did not end")
            return {**found, "sent": sent, "seconds": time.monotonic() - began}

    # Packets of netfront's API

    def _packets(self, seconds: float, peer: str, port: int, first: bool, tcp: bool) -> dict[str, Any]:
        """The first sends lots of packets, each of them again until the other has answered that it has them all."""
        to = bytes.fromhex(peer.replace(":", "")) + self.vif.mac + _KIND
        return self._first(to, port, seconds) if first else self._second(to, port)

    def _first(self, to: bytes, port: int, seconds: float) -> dict[str, Any]:
        from pvdrivers.frontends.netfront import Frame

        began, lot, data = time.monotonic(), 0, bytes(_block(port)[: _LOT * _PAYLOAD])
        while True:
            last = time.monotonic() - began >= seconds
            number = lot.to_bytes(8, "big")
            parts = [data[i * _PAYLOAD : (i + 1) * _PAYLOAD] for i in range(_LOT)]
            frames = [Frame(to + number + bytes([i, last]) + part) for i, part in enumerate(parts)]
            for _ in range(int(_PATIENCE / _AGAIN)):
                self.vif.send_all(frames, timeout=_PATIENCE)
                if self._heard(number):
                    break
            else:
                raise TimeoutError(f"no answer to lot {lot} of packets")
            lot += 1
            if last:
                return {"sent": lot * len(data), "received": 0, "right": True, "seconds": time.monotonic() - began}

    def _heard(self, number: bytes) -> bool:
        deadline = time.monotonic() + _AGAIN
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                if self.vif.receive(left)[14:22] == number:
                    return True
        return False

    def _second(self, to: bytes, port: int) -> dict[str, Any]:
        began, data, wanted, have = time.monotonic(), bytes(_block(port)[: _LOT * _PAYLOAD]), 0, set[int]()
        right, nbytes, over = True, 0, 0.0
        while not over or time.monotonic() < over:
            try:
                frame = self.vif.receive(_AGAIN if over else _PATIENCE)
            except TimeoutError:
                if over:
                    break
                raise
            lot, i, last = int.from_bytes(frame[14:22], "big"), frame[22], frame[23]
            right &= frame[24:] == data[i * _PAYLOAD : (i + 1) * _PAYLOAD] and lot <= wanted
            if lot == wanted and i not in have:
                have.add(i)
                nbytes += len(frame) - 24
            if len(have) == _LOT:
                wanted, have = wanted + 1, set()
                self.vif.send(to + frame[14:22])
                # An answer may be lost, and then the last lot comes once more.
                over = time.monotonic() + 3 * _AGAIN if last else 0.0
            elif lot < wanted and i == _LOT - 1:
                self.vif.send(to + frame[14:22])
        return {"sent": 0, "received": nbytes, "right": right, "seconds": time.monotonic() - began}

    def close(self) -> None:
        if self._tap is not None:
            self._tap.close()
        self.vif.close()
        self.platform.close()


def _to(peer: str, port: int) -> socket.socket:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return socket.create_connection((peer, port), timeout=_PATIENCE)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _from(port: int) -> socket.socket:
    with socket.create_server(("", port)) as server:
        server.settimeout(_PATIENCE)
        return server.accept()[0]


def _hear(sock: socket.socket, port: int, found: dict[str, Any]) -> None:
    """Compare what comes, until that was all; on a thread."""
    want, have = _block(port), bytearray(_BLOCK)
    view, number, at = memoryview(have), 0, 0
    try:
        while n := sock.recv_into(view[at:]):
            at += n
            if at == _BLOCK:
                found["right"] &= have == _numbered(want, number)
                found["received"] += at
                number, at = number + 1, 0
        found["right"] &= at == 0
    except OSError as e:
        found["right"], found["failure"] = False, str(e)


def _start(setup: dict[str, Any]) -> tuple[Answer, Callable[[], None]]:
    guest = _Guest(setup)
    return guest.handle, guest.close


def main() -> int:
    return answer(_start)


if __name__ == "__main__":
    sys.exit(main())
