"""What a disk or a vif is measured on: an embedded Xen, a `serve` process beside it, and guests' processes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pvdrivers.closing import Closing
from pvdrivers.platform import open_platform
from pvdrivers.sim import toolstack
from pvdrivers.sim.joined import SimPlatform
from pvdrivers.sim.launch import EmbeddedXen
from pvdrivers.toolstack import Value, wait_for, what_it_said
from pvdrivers.xenbus import XenbusState
from pvdrivers.xl_vif import new_mac

from .agent import Agent, AgentError
from .files import shared_memory
from .machine import Missing, on_cpus

__all__ = ["Bed"]

_READY_SECONDS = 120.0  # a cold cache is compiled first


class Bed(Closing):
    """An embedded Xen with a backend process; guests come by guest(). A context manager that ends them all."""

    def __init__(
        self,
        *,
        cpus: Collection[int] | None = None,
        workers: int | None = 1,
        spin_us: int = 0,
        memory_mib: int | None = None,
        environ: dict[str, str] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        """`cpus`: where `serve` runs. `environ`: what else it finds in its environment. `classes`: what it serves."""
        shm = shared_memory()
        self._directory = tempfile.TemporaryDirectory(prefix="pvdrivers-bench-", dir=shm)
        self.run_dir = Path(self._directory.name)
        self._guests: list[Agent] = []
        self.serve: subprocess.Popen[bytes] | None = None
        self._command = [sys.executable, "-m", "pvdrivers", "serve", "--run-dir", str(self.run_dir)]
        self._command += ["--spin", str(spin_us)] + ([] if workers is None else ["--workers", str(workers)])
        self._command += ["--class", *classes] if classes else []
        self._cpus, self._environ = cpus, {**os.environ, **(environ or {})}
        self._xen = EmbeddedXen(self.run_dir, memory_mib=memory_mib)
        self.dom0: SimPlatform | None = None
        try:
            self.dom0 = cast(SimPlatform, open_platform("sim", run_dir=self.run_dir))
            self.start_serve()
        except BaseException:
            self.close()
            raise

    def start_serve(self) -> float:
        """Start `serve`; seconds from its start to its line that it is ready. Raises AgentError."""
        log = self.run_dir / "serve.log"
        began = time.monotonic()
        with on_cpus(self._cpus), log.open("wb") as said:
            self.serve = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, env=self._environ
            )
        assert self.serve.stdout is not None
        ready, _, _ = select.select([self.serve.stdout], [], [], _READY_SECONDS)
        line = self.serve.stdout.readline() if ready else b""
        seconds = time.monotonic() - began
        if not line.startswith(b"ready"):
            raise AgentError(f"serve did not become ready: {log.read_text(errors='replace').strip()}")
        return seconds

    def stop_serve(self) -> None:
        """End `serve` in order."""
        if self.serve is None:
            return
        self.serve.send_signal(signal.SIGTERM)
        try:
            self.serve.wait(30)
        except subprocess.TimeoutExpired:
            self.serve.kill()
            self.serve.wait()
        assert self.serve.stdout is not None
        self.serve.stdout.close()
        self.serve = None

    @property
    def pid(self) -> int:
        """Of `serve`."""
        assert self.serve is not None
        return self.serve.pid

    def pin_workers(self, cpus: Sequence[int]) -> None:
        """Have worker k of `serve` on the k-th of these cores alone."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            name, _, index = (task / "comm").read_text().strip().rpartition("-")
            if name == "worker" and index.isdigit():
                os.sched_setaffinity(int(task.name), {cpus[int(index)]})

    def disks(self, params: Sequence[str], *, memory_mib: int = 64, **options: Any) -> list[dict[str, Any]]:
        """A new domain with these disks (URI,key=value,...), as guest() wants them. `options` are Blkfront's."""
        assert self.dom0 is not None
        domain = toolstack.create_domain(self.dom0, memory_mib=memory_mib)
        found = []
        for i, uri in enumerate(params):
            vdev = f"xvd{chr(ord('a') + i)}"
            mode = "r" if ",mode=r" in uri else "w"
            toolstack.attach_vbd(self.dom0.store, domain.domid, vdev, uri, mode=mode)
            token = domain.token.hex()
            found.append({"domid": domain.domid, "token": token, "devid": toolstack.devid_of(vdev), **options})
        return found

    def vif(
        self, bridge: str, *, memory_mib: int = 16, keys: Mapping[str, Value] | None = None, **options: Any
    ) -> dict[str, Any]:
        """A new domain with a vif, as net_guest() wants it, once a backend has taken it. `keys` are more ones of its
        backend directory, `options` are Netfront's.

        Raises Missing with what the backend has to say against such a port.
        """
        assert self.dom0 is not None
        store, mac = self.dom0.store, new_mac()
        domain = toolstack.create_domain(self.dom0, memory_mib=memory_mib)
        own: dict[str, Value] = {"mac": mac, "handle": 0}
        back = {**own, "bridge": bridge, **(keys or {})}
        backend = toolstack.attach(store, "vif", domain.domid, 0, be=back, fe=own)
        if wait_for(store, backend, (XenbusState.InitWait,), _READY_SECONDS) is not XenbusState.InitWait:
            raise Missing(what_it_said(store, backend) or f"no backend has taken a vif on {bridge}")
        return {"domid": domain.domid, "token": domain.token.hex(), "mac": mac, **options}

    def net_guest(
        self, vifs: Sequence[dict[str, Any]], cpus: Collection[int] | None = None, working_set: int = 2 << 20,
        *, pairs: Sequence[int] = (), staging: bool = True,
    ) -> Agent:  # fmt: skip
        """A process that has these vifs and generates packets (net_guest.py), connected. Raises AgentError. `pairs`:
        cores, each for the load of one queue of all vifs."""
        setup = {
            "run_dir": str(self.run_dir), "vifs": list(vifs), "working_set": working_set, "pairs": list(pairs),
            "staging": staging,
        }  # fmt: skip
        guest = Agent("pvdrivers.bench.net_guest", setup, cpus)
        self._guests.append(guest)
        return guest

    def guest(self, disks: Sequence[dict[str, Any]], cpus: Collection[int] | None = None) -> Agent:
        """A process with these disks, connected. Raises AgentError."""
        guest = Agent("pvdrivers.bench.guest", {"run_dir": str(self.run_dir), "disks": list(disks)}, cpus)
        self._guests.append(guest)
        return guest

    def close(self) -> None:
        """End everything."""
        for guest in self._guests:
            guest.close()
        try:
            self.stop_serve()
            if self.dom0 is not None:
                self.dom0.close()
        finally:
            self._xen.close()
            self._directory.cleanup()
