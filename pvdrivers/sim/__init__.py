"""The embedded Xen: domains, grant tables, event channels and a xenstore, on a machine without a hypervisor.

One process, ``pvdrivers sim``, is the hypervisor and the store. Every other process joins it as a handle of some
domain. Memory and events then flow between the processes themselves: the hypervisor sets things up and is out of
the data path. docs/joining.md tells what a program in another language has to do.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .joined import SimPlatform


def open(
    run_dir: str | os.PathLike[str],
    domid: int = 0,
    token: bytes | str | None = None,
    *,
    strict: bool = False,
    abi: str = "2l",
) -> SimPlatform:
    """Join the embedded Xen of `run_dir` as `domid`; a guest needs the `token` of create_domain (16 bytes or hex).

    `strict` maps only what is granted at the moment, so that a use after unmap faults. `abi` is that of the event
    channels, "2l" (4096 ports) or "fifo" (131072 ports, 16 priorities). Raises PlatformError.
    """
    from .joined import SimPlatform  # numba comes with it; the hypervisor process does without

    key = bytes.fromhex(token) if isinstance(token, str) else token
    return SimPlatform(Path(run_dir), domid, key, strict=strict, abi=abi)
