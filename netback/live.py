"""What of a vif may change while it is connected: written into its port, where its worker finds it.

Numbers of 8 bytes, each by itself: a packet or two may go by an old rate with a new burst.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pvdrivers.device import DeviceId
from pvdrivers.platform import XenStore
from rings import netif

from .params import DRAIN_BLIND_MS, DRAIN_MS, STALL_MS, LiveSpec, live_of, vif_of
from .switch import Port

if TYPE_CHECKING:
    from .backend import VifBackend

ETHERNET = 14


def apply(port: Port, spec: LiveSpec) -> None:
    """Have all that is sent from now on go by `spec`."""
    row = port.record[0]
    for limit in port.limits:
        limit["burst"] = float(spec.burst)
        limit["rate"] = spec.rate / 1e9
    row["most"] = spec.mtu + ETHERNET if spec.mtu else 0
    row["down"] = int(not spec.up)
    told = bool(row["notifies"])
    drain = (DRAIN_MS if told else DRAIN_BLIND_MS) if spec.drain_ms is None else spec.drain_ms
    # Who never says that there are buffers cannot be told from one who has none to give.
    stall = (STALL_MS if spec.stall_ms is None else spec.stall_ms) if told else 0
    row["drain_ns"], row["stall_ns"] = drain * 1_000_000, stall * 1_000_000


def hold_to_keys(device: VifBackend, most_queues: int) -> list[str]:
    """Have what holds while a vif is connected be what the toolstack says now. What makes no sense of all its keys."""
    _, errors = vif_of(device.params, most_queues)
    device.live, wrong = live_of(device.params, device.live)
    apply(device.port, device.live)
    if wrong:
        _keep(_path(device), device.live)
    else:
        forget_live(device)
    return errors + wrong


def _keep(path: Path, spec: LiveSpec) -> None:
    """For the next process: of a key that makes no sense the store does not tell what was before."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_text(json.dumps(asdict(spec)))
    except OSError:
        pass  # no room: then that one has what holds without the key


def live_before(device: VifBackend) -> LiveSpec:
    """What held in a process before this one, as far as the store does not tell it; else what holds without a key."""
    try:
        return LiveSpec(**json.loads(_path(device).read_text()))
    except (OSError, ValueError, TypeError):  # it has died while it wrote, or was of another version
        return LiveSpec()


def forget_live(device: VifBackend) -> None:
    """All that holds is in the store, or nothing does."""
    _path(device).unlink(missing_ok=True)


def _path(device: VifBackend) -> Path:
    return device.context.run_dir / "live" / str(device.ident)


def wants_filter(store: XenStore, ident: DeviceId) -> bool:
    """What `request-multicast-control` says now: what is no 0 counts as 1, as of a live guest nothing is refused."""
    try:
        wish = store.read(f"{ident.frontend_path}/{netif.KEY_REQUEST_MCAST}")
    except PermissionError:
        return False
    return wish is not None and wish.strip(b" \t\n\0") not in (b"", b"0")


def carrier(port: Port) -> dict[str, str | int | bytes]:
    """The key of netif.h that says whether packets pass: not while the operator has the link down, or the guest takes
    nothing."""
    row = port.record[0]
    return {netif.KEY_CARRIER: int(row["down"] == 0 and row["stalled"] == 0)}
