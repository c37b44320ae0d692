"""iperf3's TCP between two network namespaces of this machine, by whatever joins them. It takes root.

    Veth      a veth pair
    Spliced   a TAP in each, and splice.c, which carries packets from one to the other
    Ring      a TAP in each, and all of ours between them: a guest's netfront drives one, netback has the other
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pvdrivers.closing import Closing

from ..bed import Bed
from ..machine import Missing, cpu_seconds, on_cpus, program

__all__ = ["Between", "Ring", "Spliced", "Veth", "figures"]

_PATIENCE = 20.0
_READY_SECONDS = 120.0
_DEVICE = "v0"  # in both


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


class Between(Closing):
    """Two namespaces, `a` with the client and `b` with the server, each with an interface; a context manager that takes
    them away."""

    made = 0

    def __init__(self, cpus: tuple[int, int] | None = None) -> None:
        """`cpus`: the server's and the client's, None: anywhere. Raises Missing."""
        self._ip, self._iperf = program("ip", "iproute2"), program("iperf3", "iperf3")
        if os.geteuid() != 0:
            raise Missing("network namespaces are made by root")
        self._cpus: list[Collection[int] | None] = [None, None] if cpus is None else [{cpu} for cpu in cpus]
        Between.made += 1
        self.a, self.b = (f"pvdbench{os.getpid()}-{Between.made}{side}" for side in "ab")
        self._carriers: list[int] = []
        try:
            for name in (self.a, self.b):
                run(self._ip, "netns", "add", name)
            self._carriers = self._join()
            for i, name in enumerate((self.a, self.b)):
                run(self._ip, "-n", name, "addr", "add", f"10.98.0.{i + 1}/24", "dev", _DEVICE)
                run(self._ip, "-n", name, "link", "set", _DEVICE, "up")
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _join(self) -> list[int]:
        """Have both joined; the processes that carry packets. Raises Missing."""

    def _in(self, name: str, *command: str) -> list[str]:
        return [self._ip, "netns", "exec", name, *command]

    def run(self, seconds: float) -> dict[str, Any]:
        """One run of whole seconds, a server for itself: from a to b."""
        return self._once(seconds)

    def both(self, seconds: float) -> dict[str, Any]:
        """One run each way; the other way's bytes a second are `back`."""
        found = self._once(seconds)
        return {**found, "back": self._once(seconds, "--reverse")["bytes_per_second"]}

    def _once(self, seconds: float, *options: str) -> dict[str, Any]:
        before = sum(map(cpu_seconds, self._carriers))
        # Its output is no pipe, or it would not be there before it has ended.
        with tempfile.TemporaryFile() as said, on_cpus(self._cpus[0]):
            server = subprocess.Popen(self._in(self.b, self._iperf, "-s", "-1"), stdout=said, stderr=said)
        try:
            with on_cpus(self._cpus[1]):
                client = [self._iperf, "-J", "-t", str(max(1, round(seconds))), "-c", "10.98.0.2", *options]
                for _ in range(50):  # until the server listens
                    done = subprocess.run(
                        self._in(self.a, *client), capture_output=True, text=True, timeout=seconds + _PATIENCE,
                        check=False,
                    )  # fmt: skip
                    if "refused" not in done.stdout + done.stderr:  # with -J the status is 0 whatever comes of it
                        break
                    time.sleep(0.1)
            found = figures(json.loads(done.stdout))
        finally:
            server.terminate()
            server.wait()
        if found["requests"]:
            found["cpu_us"] += (sum(map(cpu_seconds, self._carriers)) - before) / found["requests"] * 1e6
        return found

    def close(self) -> None:
        """Take the namespaces away."""
        for name in (self.a, self.b):
            with contextlib.suppress(OSError):
                subprocess.run([self._ip, "netns", "del", name], capture_output=True, check=False)


class Veth(Between):
    """A veth pair."""

    def _join(self) -> list[int]:
        run(self._ip, "link", "add", _DEVICE, "netns", self.a, "type", "veth", "peer", "name", _DEVICE, "netns", self.b)
        return []


def _ready(process: subprocess.Popen[str], what: str) -> None:
    """Wait for a process's first line. Raises Missing with what it said instead."""
    assert process.stdout is not None
    there, _, _ = select.select([process.stdout], [], [], _READY_SECONDS)
    line = process.stdout.readline() if there else ""
    if not line.startswith(what):
        raise Missing(line.strip() or "it said nothing")


class _Process(Closing):
    """One that carries packets, from its first line on."""

    def __init__(self, command: list[str], what: str) -> None:
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            _ready(self.popen, what)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.popen.terminate()
        try:
            self.popen.wait(20)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            assert stream is not None
            stream.close()


class _Carried(Between):
    """Two TAPs, and processes of ours or of the peer's between them."""

    def __init__(self, cpus: tuple[int, int] | None = None) -> None:
        self._stack = contextlib.ExitStack()
        super().__init__(cpus)

    def close(self) -> None:
        """Processes first: what they have in a namespace keeps it."""
        self._stack.close()
        super().close()


class Spliced(_Carried):
    """The bare loop, compiled here and now."""

    def _join(self) -> list[int]:
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise Missing("no C compiler (apt-get install gcc)")
        directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pvdrivers-bench-"))
        splice = f"{directory}/splice"
        run(compiler, "-O3", "-march=native", "-o", splice, str(Path(__file__).with_name("splice.c")))
        command = [splice, self.a, _DEVICE, self.b, _DEVICE]
        return [self._stack.enter_context(_Process(command, "ready")).popen.pid]


class Ring(_Carried):
    """A guest in `a` whose netfront drives a TAP there, and `serve`, whose vif has a TAP in `b` on its other side."""

    def _join(self) -> list[int]:
        bed = self._stack.enter_context(Bed(classes=["vif"]))
        net = f"tap:{_DEVICE};netns={self.b},tap={_DEVICE}"
        command = [sys.executable, "-m", "pvdrivers", "guest", "--run-dir", str(bed.run_dir), "--memory", "16"]
        guest = self._stack.enter_context(_Process(self._in(self.a, *command, "--net", net), "vif 0: "))
        return [bed.pid, guest.popen.pid]
