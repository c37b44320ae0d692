"""``pvdrivers sim``: the embedded Xen in the foreground, until it is told to stop."""

from __future__ import annotations

import argparse
import resource
import signal
from pathlib import Path

from pvdrivers.sim.hypervisor import Hypervisor


def run(args: argparse.Namespace) -> int:
    """Serve `args.run_dir`; prints one line when programs may join. SIGTERM and SIGINT end it in order."""
    # Two eventfds for each event channel: as many as we are allowed.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    xen = Hypervisor(Path(args.run_dir), memory_mib=getattr(args, "memory", None))
    before = [(s, signal.signal(s, lambda *_: xen.stop())) for s in (signal.SIGTERM, signal.SIGINT)]
    try:
        print(f"ready: {args.run_dir}", flush=True)
        xen.run()
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        xen.close()
    return 0
