"""DPDK's testpmd beside us: a vhost-user switch of two ports (mode io), and a process that drives both (mode flowgen).

Two processes, a forwarding core each, no huge pages, no card. The second one has two virtio-user ports, writes the
headers of packets and sends them by both, and frees what comes: packets go both ways, and are copied by vhost alone.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from pvdrivers.closing import Closing

from ..machine import Missing, cpu_seconds, program

__all__ = ["Testpmd", "received"]

_ANSWER_SECONDS = 20.0
_LINK_SECONDS = 1.5
_SETTLE_SECONDS = 0.2
_QUEUE_SIZE = 1024
_EAL = ["--no-huge", "-m", "512", "--no-pci"]
_MODE = ["-i", "--no-mlockall", "--total-num-mbufs=16384", "--burst=64"]


def received(text: str) -> int:
    """Packets that all ports have received, of what "show port stats all" says."""
    # Not those of "Forward statistics", which "stop" prints.
    found = re.findall(r"NIC statistics for port \d+ +#+\s+RX-packets: +(\d+)", text)
    if not found:
        raise ValueError(f"testpmd says nothing of RX-packets: {text[-200:]!r}")
    return sum(map(int, found))


class Testpmd(Closing):
    """Both processes, ready; a context manager that ends them. `cpus`: of the switch, of the load."""

    def __init__(self, size: int, cpus: tuple[int, int]) -> None:
        """Packets of `size` bytes. Raises Missing."""
        binary, stdbuf = program("dpdk-testpmd", "dpdk-dev"), program("stdbuf", "coreutils")
        self._size = size
        self._directory = tempfile.TemporaryDirectory(prefix="pvdrivers-bench-")
        self._processes: list[subprocess.Popen[str]] = []
        home = Path(self._directory.name)
        (home / "rt").mkdir()
        switch, load = cpus
        ports = [home / f"s{i}.sock" for i in range(2)]
        vhost = [f"net_vhost{i},iface={path},queues=1" for i, path in enumerate(ports)]
        user = [f"net_virtio_user{i},path={path},queues=1,queue_size={_QUEUE_SIZE},in_order=1"
                for i, path in enumerate(ports)]  # fmt: skip
        try:
            # Lcore 0 reads commands, on the other's core; lcore 1 forwards.
            for name, core, other, devices, more in (
                ("vh", switch, load, vhost, ["--forward-mode=io"]),
                ("vu", load, switch, user, ["--forward-mode=flowgen", f"--txpkts={size}"]),
            ):
                command = [stdbuf, "-oL", binary, "--lcores", f"0@{other},1@{core}", *_EAL, f"--file-prefix={name}"]
                command += ["--single-file-segments"] if name == "vu" else []
                command += [word for device in devices for word in ("--vdev", device)]
                process = subprocess.Popen(
                    [*command, "--", *_MODE, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    stderr=subprocess.STDOUT, env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": f"{home}/rt"},
                )  # fmt: skip
                self._processes.append(process)
                self._ask(self._processes[-1], "show port stats all")
            time.sleep(_LINK_SECONDS)
            self._go("start")
            self.run(_SETTLE_SECONDS)
        except BaseException:
            self.close()
            raise

    def _ask(self, process: subprocess.Popen[str], command: str) -> str:
        """A command whose answer ends with the throughput of the second port."""
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(command + "\n")
        process.stdin.flush()
        text, deadline = "", time.monotonic() + _ANSWER_SECONDS
        while len(re.findall(r"Tx-pps:", text)) < 2:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            # Not readline: what that has buffered, select() does not see.
            piece = os.read(process.stdout.fileno(), 65536) if ready else b""
            if not piece:
                raise Missing(f"dpdk-testpmd does not run here: {' '.join(text.split())[-200:] or 'it says nothing'}")
            text += piece.decode(errors="replace")
        return text

    def _go(self, command: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(command + "\n")
            process.stdin.flush()

    def run(self, seconds: float) -> dict[str, Any]:
        """Forward for so long: packets received at both ports of the load, CPU of both processes."""
        user = self._processes[1]
        before = [cpu_seconds(process.pid) for process in self._processes]
        first, began = received(self._ask(user, "show port stats all")), time.monotonic()
        time.sleep(seconds)
        packets, took = received(self._ask(user, "show port stats all")) - first, time.monotonic() - began
        spent = [cpu_seconds(process.pid) - since for process, since in zip(self._processes, before)]
        if not packets:
            raise Missing("dpdk-testpmd runs, and no packet comes through")
        return {
            "rate": packets / took, "requests": packets, "seconds": took,
            "bytes_per_second": packets * self._size / took, "cpu_us": sum(spent) / packets * 1e6,
            "switch_ns": spent[0] / packets * 1e9,
        }  # fmt: skip

    def pause(self) -> None:
        """Let the cores be."""
        self._go("stop")

    def go_on(self) -> None:
        """The end of pause()."""
        self._go("start")
        time.sleep(_SETTLE_SECONDS)

    def close(self) -> None:
        """End both."""
        for process in reversed(self._processes):
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write("quit\n")
                process.stdin.close()
            except BrokenPipeError:
                pass
            try:
                process.communicate(timeout=10)
            except (subprocess.TimeoutExpired, ValueError):
                process.kill()
                process.wait()
            process.stdout.close()
        self._directory.cleanup()
