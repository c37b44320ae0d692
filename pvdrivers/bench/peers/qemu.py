"""qemu-storage-daemon beside us: a file behind a vhost-user-blk export, driven by vhost_user_blk.py."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pvdrivers.closing import Closing

from ..agent import Agent
from ..machine import on_cpus, program

__all__ = ["StorageDaemon"]

_START_SECONDS = 20.0


class StorageDaemon(Closing):
    """A storage daemon with one disk, and a client process of it. A context manager that ends both."""

    def __init__(
        self,
        path: Path,
        *,
        depth: int,
        block_size: int = 4096,
        random: bool = True,
        cpus: Collection[int] | None = None,
        client_cpus: Collection[int] | None = None,
        iothread: bool = False,
        spin: int = 0,
    ) -> None:
        """The file is opened read-only. `spin`: looks of the client at the ring before it sleeps.

        `iothread`: the daemon works on a thread that polls (QEMU's default, 32 us) before it sleeps. Raises Missing.
        """
        binary = program("qemu-storage-daemon", "qemu-system-common")
        self._directory = tempfile.TemporaryDirectory(prefix="pvdrivers-bench-")
        where = Path(self._directory.name) / "export"
        export = f"type=vhost-user-blk,id=e0,node-name=f0,addr.type=unix,addr.path={where},writable=off"
        command = [binary]
        if iothread:
            command += ["--object", "iothread,id=io0"]
            export += ",iothread=io0"
        # No lock, as ours has the same file open beside it.
        node = f"driver=file,node-name=f0,filename={path},cache.direct=on,aio=io_uring,read-only=on,locking=off"
        command += ["--blockdev", node, "--export", export]
        self.spin = spin
        self._client: Agent | None = None
        with on_cpus(cpus):
            self._daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            give_up = time.monotonic() + _START_SECONDS
            while not where.exists():
                if self._daemon.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError("qemu-storage-daemon did not start; what it said is above")
                time.sleep(0.01)
            setup = {
                "socket": str(where), "size": path.stat().st_size, "block_size": block_size, "depth": depth,
                "op": "read", "random": random,
            }  # fmt: skip
            self._client = Agent("pvdrivers.bench.peers.vhost_user_blk", setup, client_cpus)
        except BaseException:
            self.close()
            raise

    def run(self, seconds: float) -> dict[str, Any]:
        """A load for so long; CPU is that of the daemon and the client."""
        assert self._client is not None
        command = {"run": {"seconds": seconds, "spin": self.spin}, "watch": [self._daemon.pid]}
        return self._client.ask(command, seconds)

    def close(self) -> None:
        """End both."""
        if self._client is not None:
            self._client.close()
        self._daemon.terminate()
        try:
            self._daemon.wait(10)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()
        self._directory.cleanup()
