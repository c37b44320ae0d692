"""iperf3 beside us: TCP between two network namespaces of this machine, by a veth pair. It takes root."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from typing import Any

from pvdrivers.closing import Closing

from ..machine import Missing, on_cpus, program

__all__ = ["Veth", "figures"]

_PATIENCE = 20.0


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """What a client's --json says, in the form of an agent's answer; a request is a segment of 64 KiB."""
    if "error" in report:
        raise RuntimeError(f"iperf3: {report['error']}")
    end = report["end"]
    seconds, nbytes = end["sum_received"]["seconds"], end["sum_received"]["bytes"]
    cpu = (end["cpu_utilization_percent"]["host_total"] + end["cpu_utilization_percent"]["remote_total"]) / 100
    requests = nbytes / 65000
    return {
        "rate": requests / seconds, "requests": int(requests), "seconds": seconds,
        "bytes_per_second": nbytes / seconds, "cpu_us": cpu * seconds / requests * 1e6 if requests else None,
    }  # fmt: skip


def run(*command: str) -> None:
    """A command that has to work. Raises Missing with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


class Veth(Closing):
    """Two namespaces and a pair between them; a context manager that takes them away. `cpus`: receiver's, sender's."""

    def __init__(self, cpus: tuple[int, int]) -> None:
        """Raises Missing."""
        self._ip, self._iperf = program("ip", "iproute2"), program("iperf3", "iperf3")
        if os.geteuid() != 0:
            raise Missing("network namespaces are made by root")
        self._cpus = cpus
        self._names = [f"pvdbench{os.getpid()}{side}" for side in "ab"]
        try:
            for name in self._names:
                run(self._ip, "netns", "add", name)
            a, b = self._names
            run(self._ip, "link", "add", "v0", "netns", a, "type", "veth", "peer", "name", "v0", "netns", b)
            for i, name in enumerate(self._names):
                run(self._ip, "-n", name, "addr", "add", f"10.98.0.{i + 1}/24", "dev", "v0")
                run(self._ip, "-n", name, "link", "set", "v0", "up")
        except BaseException:
            self.close()
            raise

    def run(self, seconds: float) -> dict[str, Any]:
        """One run of whole seconds, a server for itself."""
        a, b = self._names
        command = [self._ip, "netns", "exec"]
        # Its output is no pipe, or it would not be there before it has ended.
        with tempfile.TemporaryFile() as said, on_cpus({self._cpus[0]}):
            server = subprocess.Popen([*command, b, self._iperf, "-s", "-1"], stdout=said, stderr=said)
        try:
            with on_cpus({self._cpus[1]}):
                client = [*command, a, self._iperf, "-J", "-t", str(max(1, round(seconds))), "-c", "10.98.0.2"]
                for _ in range(50):  # until the server listens
                    done = subprocess.run(
                        client, capture_output=True, text=True, timeout=seconds + _PATIENCE, check=False
                    )
                    if "refused" not in done.stdout + done.stderr:  # with -J the status is 0 whatever comes of it
                        break
                    time.sleep(0.1)
            return figures(json.loads(done.stdout))
        finally:
            server.terminate()
            server.wait()

    def close(self) -> None:
        """Take the namespaces away."""
        for name in self._names:
            with contextlib.suppress(OSError):
                subprocess.run([self._ip, "netns", "del", name], capture_output=True, check=False)
