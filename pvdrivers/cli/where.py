"""Which Xen a command is about: the embedded one of a run directory, or the one that this host runs on."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from pvdrivers.errors import PlatformError, UnavailableError

if TYPE_CHECKING:
    from pvdrivers.xenstore import XenStoreClient

GNTDEV = "/dev/xen/gntdev"


def embedded(run_dir: Path) -> bool:
    """Whether the embedded Xen runs in this directory; if not, there has to be a real one."""
    socket_path = run_dir / "xenstored"
    try:
        if socket_path.exists() and (_answers(socket_path) or not os.path.exists(GNTDEV)):
            return True
    except OSError as e:
        raise PlatformError(f"run directory {run_dir}: {e.strerror} for user {os.geteuid()}") from e
    if os.path.exists(GNTDEV):
        return False
    if os.path.exists("/sys/hypervisor/type") and Path("/sys/hypervisor/type").read_text().strip() == "xen":
        raise UnavailableError(
            f"this host runs on Xen, but there is no {GNTDEV}: modprobe -a xen-gntdev xen-evtchn; then start the"
            " service again, which is not tried by itself"
        )
    raise UnavailableError(
        f"no embedded Xen in {run_dir} (start one with: pvdrivers sim --run-dir {run_dir}), and this is no Xen host"
        f" (no {GNTDEV}); to see it all at work, type: pvdrivers demo"
    )


def _answers(path: Path) -> bool:
    """Whether somebody listens: the socket of an embedded Xen that was killed stays."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        try:
            s.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def open_devices() -> None:
    """On the real Xen: that its devices can be had is found out before all kernels are loaded. Raises PlatformError."""
    from pvdrivers.xen.devices import EVTCHN, open_device

    for path in (GNTDEV, EVTCHN):
        os.close(open_device(path))


def store_path(run_dir: Path, is_embedded: bool) -> str:
    """Where xenstore answers."""
    from pvdrivers.xenstore import default_path

    return str(run_dir / "xenstored") if is_embedded else default_path()


def open_store(run_dir: Path) -> XenStoreClient:
    """A connection to xenstore. Raises PlatformError."""
    from pvdrivers.xenstore import XenStoreClient

    try:
        return XenStoreClient.connect(store_path(run_dir, embedded(run_dir)))
    except OSError as e:
        raise PlatformError(str(e)) from e
