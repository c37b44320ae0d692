"""What the verbs that attach and detach have in common, whatever class the device is of."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Protocol

from pvdrivers import toolstack
from pvdrivers.errors import ConfigError, PlatformError
from pvdrivers.xenbus import XenbusState
from pvdrivers.xenstore import XenStoreClient

__all__ = ["attached", "let_go", "wait_attached"]

_READY = (XenbusState.InitWait, XenbusState.Initialised, XenbusState.Connected)


class _Find(Protocol):
    def __call__(self, store: XenStoreClient, domid: int, /) -> Sequence[toolstack.Attached]: ...


def wait_attached(store: XenStoreClient, backend: str, what: str, find: _Find, args: argparse.Namespace) -> XenbusState:
    """Wait until a backend has taken a new device (--connect: until the guest has, too); the state that it is in.

    `what` it is called, "xvdb of domain 5"; `find` lists devices of its class. If it is not taken in time nothing of it
    is left, and PlatformError says why.
    """
    home, kind, domid = backend.split("/")[3], backend.split("/")[5], int(backend.split("/")[6])
    deadline = time.monotonic() + args.timeout
    state = toolstack.wait_for(store, backend, _READY, args.timeout)
    if state in _READY and args.connect:
        state = toolstack.wait_for(store, backend, (XenbusState.Connected,), deadline - time.monotonic())
    if state in _READY and (state is XenbusState.Connected or not args.connect):
        return state
    why = toolstack.what_it_said(store, backend)
    theirs = next((d.front_state for d in find(store, domid) if d.backend == backend), "")
    toolstack.detach(store, backend, timeout=1.0, force=True, at_once=True)
    if not why and state is XenbusState.Initialising:
        why = (
            f"no backend has taken it within {args.timeout:g} s: is `pvdrivers serve` running in domain {home}, and"
            f" does it serve the class {kind}, and this domain?"
        )
    elif not why:
        why = f"the guest has not connected within {args.timeout:g} s: its state is {theirs or 'not there'}"
    raise PlatformError(f"{what}: {why}")


def attached(name: str, domid: int, state: XenbusState) -> str:
    """The line that says so."""
    guest = "" if state is XenbusState.Connected else "; the guest has not connected yet"
    return f"{name}: attached to domain {domid}, {state.name}{guest}"


def let_go(
    store: XenStoreClient, device: toolstack.Attached, what: str, find: _Find, args: argparse.Namespace,
    *, verb: str, hint: str,
) -> None:  # fmt: skip
    """Detach a device. `verb` of xl's is for those that xl has attached; `hint`: why a guest may keep it.

    Raises ConfigError, or PlatformError if it is not let go within --timeout.
    """
    domid = int(device.backend.split("/")[6])
    if device.made_by_xl:
        raise ConfigError(f"{what} was attached by xl: xl {verb} {domid} {device.name}")
    if toolstack.detach(store, device.backend, timeout=args.timeout, force=args.force, at_once=args.force):
        return
    why = toolstack.what_it_said(store, device.backend)
    if args.force:
        raise PlatformError(
            f"{what}: taken away, but its backend was not seen to let go within"
            f" {args.timeout:g} s{': ' + why if why else ''}; is `pvdrivers serve` running?"
        )
    state = next((d for d in find(store, domid) if d.backend == device.backend), device)
    raise PlatformError(
        f"{what}: not let go within {args.timeout:g} s: backend {state.state.name}, frontend"
        f" state {state.front_state or 'not there'}{': ' + why if why else ''}; {hint}; --force takes it away at once"
    )
