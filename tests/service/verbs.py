"""What tests of the verbs that attach and detach have in common: a guest, and how an error looks."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from typing import Any

from pvdrivers.frontends.blkfront import Blkfront
from pvdrivers.frontends.netfront import Netfront
from pvdrivers.platform import open_platform
from pvdrivers.sim import toolstack
from tests.restart.bed import Bed


class Guest:
    """A domain with a name, whose frontends the test starts."""

    def __init__(self, bed: Bed, stack: ExitStack, name: str) -> None:
        self.bed, self.stack, self.name = bed, stack, name
        domain = toolstack.create_domain(bed.dom0, name=name, memory_mib=16)
        self.domid = domain.domid
        stack.callback(toolstack.clean, bed.dom0.store, domain.domid, domain.uuid)
        self.platform: Any = open_platform("sim", run_dir=bed.run_dir, domid=domain.domid, token=domain.token)
        stack.callback(self.platform.close)

    def disk(self, devid: int) -> Blkfront:
        disk = Blkfront(self.platform, devid, queues=1, ring_order=0)
        disk.connect(timeout=20)
        return disk

    def vif(self, devid: int) -> Netfront:
        vif = Netfront(self.platform, devid)
        self.stack.callback(vif.close)
        vif.connect(timeout=20)
        return vif


def fails(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1 and done.stdout == "", done
    assert done.stderr.startswith("pvdrivers: error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
