"""Network namespaces for tests of the network backend: guests, and what stands for the rest of a host."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import COMMAND


def run(*command: str, timeout: float = 30) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}"
    return done.stdout


def need(program: str) -> None:
    if shutil.which(program) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is not installed")
        pytest.skip(f"{program} is not installed")


def ip(number: int, *, six: bool = False) -> str:
    """The address of the machine of this number."""
    return f"fd98::{number}" if six else f"10.98.0.{number}"


class Namespace:
    """A network namespace of the test's own, with a loopback that is up."""

    made = 0

    def __init__(self) -> None:
        Namespace.made += 1
        self.name = f"pvt{os.getpid()}-{Namespace.made}"
        run("ip", "netns", "add", self.name)
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *command: str, timeout: float = 30) -> str:
        return run("ip", "netns", "exec", self.name, *command, timeout=timeout)

    def popen(self, *command: str, text: bool = True) -> subprocess.Popen[str]:
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=text)  # fmt: skip

    def address(self, device: str, number: int) -> None:
        """It has these addresses from now on, and is up."""
        self.run("ip", "addr", "add", f"{ip(number)}/24", "dev", device)
        self.run("ip", "addr", "add", f"{ip(number, six=True)}/64", "dev", device, "nodad")
        self.run("ip", "link", "set", device, "up")

    def has(self, device: str) -> bool:
        command = ["ip", "-n", self.name, "link", "show", device]
        return subprocess.run(command, capture_output=True).returncode == 0

    def end(self) -> None:
        run("ip", "netns", "del", self.name)


class Bridged(Namespace):
    """A host with the bridge br0, and a veth from there into another namespace, `peer`: eth0, 10.98.0.9."""

    def __init__(self, mtu: int = 1500) -> None:
        super().__init__()
        self.peer = Namespace()
        self.run("ip", "link", "add", "br0", "type", "bridge")
        self.run("ip", "link", "set", "br0", "up")
        self.run("ip", "link", "add", "veth0", "mtu", str(mtu), "type", "veth", "peer", "name", "eth0", "mtu", str(mtu),
                 "netns", self.peer.name)  # fmt: skip
        self.run("ip", "link", "set", "veth0", "up", "master", "br0")
        self.peer.address("eth0", 9)

    def end(self) -> None:
        super().end()
        self.peer.end()


class Machine(Namespace):
    """A guest: a process with one vif in a namespace, whose TAP there is eth0, 10.98.0.NUMBER."""

    def __init__(self, run_dir: Path, net: str, number: int) -> None:
        super().__init__()
        self.process = self.popen(*COMMAND, "guest", "--run-dir", str(run_dir), "--memory", "16", "--net", net)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        if not self.said.startswith("vif 0: 00:16:3e:"):
            super().end()
            pytest.fail(self.said)
        self.mac = self.said.split()[2]
        self.address("eth0", number)

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(20) == 0
        assert self.process.stdout is not None
        self.process.stdout.close()
        super().end()


Make = Callable[[str, int], Machine]


@contextlib.contextmanager
def guests(run_dir: Path) -> Iterator[Make]:
    """What makes a guest of a --net and a number; all of them end with it."""
    with contextlib.ExitStack() as stack:

        def make(net: str, number: int) -> Machine:
            made = Machine(run_dir, net, number)
            stack.callback(made.end)
            return made

        yield make


@contextlib.contextmanager
def iperf_server(space: Namespace) -> Iterator[None]:
    with space.popen("iperf3", "--server", "--one-off", "--forceflush") as server:
        assert server.stdout is not None
        while "listening" not in server.stdout.readline():
            pass
        yield
        server.terminate()


def ping(space: Namespace, target: str, size: int = 56, tries: int = 5) -> None:
    """One answer has to come; the first may be lost to a bridge that has just got to know its ports."""
    for _ in range(tries):
        command = ["ip", "netns", "exec", space.name, "ping", "-c", "1", "-W", "1", "-s", str(size), target]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return
        time.sleep(0.1)
    raise AssertionError(f"{target} does not answer to {size} bytes: {done.stdout}")
