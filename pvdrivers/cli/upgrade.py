"""``pvdrivers upgrade``: newly started daemons take over from the running ones, while guests go on."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path
from typing import Any

from pvdrivers import daemons
from pvdrivers.errors import ConfigError, PvError
from pvdrivers.link import receive, send

_GRACE = 120.0  # seconds beyond the time to get ready: devices that finish, and are taken over


def run(args: argparse.Namespace) -> int:
    """0 if every daemon was followed by one that has all of its devices."""
    run_dir: Path = args.run_dir
    there = daemons.running(run_dir)
    if not there:
        raise ConfigError(f"{run_dir}: no daemon runs there; name the directory of `pvdrivers serve` with --run-dir")
    wanted = [daemon for daemon in there if args.pid in (None, daemon.pid)]
    if not wanted:
        pids = ", ".join(str(daemon.pid) for daemon in there)
        raise ConfigError(f"{run_dir}: no daemon with pid {args.pid}; there is {pids}")
    failed = 0
    for daemon in wanted:
        try:
            _upgrade(run_dir, daemon, args.timeout, args.force)
        except PvError as e:
            print(f"daemon {daemon.pid} (version {daemon.version}): {e}", flush=True)
            failed += 1
    if failed:
        raise PvError(f"{failed} of {len(wanted)} daemon{'s' * (len(wanted) > 1)} could not be upgraded in order")
    return 0


def _upgrade(run_dir: Path, daemon: daemons.Daemon, timeout: float, force: bool) -> None:
    """Have one daemon followed. Raises PvError with the reason if that fails, or only half succeeds."""
    try:
        sock = daemons.connect(run_dir / "daemons" / f"{daemon.pid}.sock")
    except OSError as e:
        raise PvError(f"cannot be asked: {e.strerror}; it serves on") from e
    with sock:
        send(sock, do="upgrade", timeout=timeout, force=force)
        _follow(sock, daemon, timeout)


def _follow(sock: socket.socket, daemon: daemons.Daemon, timeout: float) -> None:
    warm = False
    pauses: list[float] = []
    while True:
        sock.settimeout(timeout + _GRACE)
        try:
            message = receive(sock)
        except TimeoutError:
            raise PvError("nothing was heard of it for too long; see its log") from None
        event = "" if message is None else message.get("event")
        if message is None:
            raise PvError("it ended before all was taken over; see its log" if warm else "it ended; see its log")
        if event == "failed":
            raise PvError(f"{message.get('why')}; it serves on")
        if event == "warm":
            warm = True
        elif event == "served":
            pauses.append(float(message["pause"]))
            print(f"{message['device']}: paused for {pauses[-1] * 1000:.1f} ms", flush=True)
        elif event == "done":
            return _done(message, daemon, pauses)


def _done(message: dict[str, Any], daemon: daemons.Daemon, pauses: list[float]) -> None:
    longest = f", paused for at most {max(pauses) * 1000:.1f} ms" if pauses else ""
    print(
        f"daemon {daemon.pid} (version {daemon.version}) -> {message['pid']} (version {message['version']}):"
        f" {len(pauses)} connected device{'' if len(pauses) == 1 else 's'}{longest}",
        flush=True,
    )
    left: dict[str, str] = message.get("left") or {}
    if left:
        raise PvError("; ".join(f"{name}: {why}" for name, why in left.items()))
