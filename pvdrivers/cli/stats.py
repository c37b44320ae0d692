"""``pvdrivers stats``: what the daemons of a run directory do, read from their counters without asking them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pvdrivers import daemons
from pvdrivers.errors import PvError
from pvdrivers.inflight import inflight
from pvdrivers.report import SUFFIX
from pvdrivers.stats import read_stats
from pvdrivers.worker.histogram import percentile

KINDS = ("read", "write", "flush", "barrier", "discard", "secure_discard", "rejected")
ROWS = ("read", "write", "other")
COUNTERS = (
    "bytes_read",
    "bytes_written",
    "errors",
    "violations",
    "notify_sent",
    "notify_saved",
    "events",
    "idle_events",
    "grants_mapped",
    "grants_copied",
    "persistent_hits",
    "persistent_held",
    "map_failures",
    "replayed",
    "fallbacks",
    "copying",
)


def _latency(hist: np.ndarray) -> dict[str, dict[str, float]]:
    """Per kind with requests: microseconds at the 50th, 90th, 99th and 99.9th percentile."""
    out = {}
    for row, name in enumerate(ROWS):
        if hist[row].any():
            out[name] = {
                label: percentile(hist[row], f) / 1000
                for label, f in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999))
            }
    return out


def _queue(row: np.void, number: int, kinds: Sequence[str]) -> dict[str, Any]:
    out: dict[str, Any] = {"queue": number, "requests": dict(zip(kinds, map(int, row["kinds"])))}
    out |= {name: int(row[name]) for name in COUNTERS}
    out["latency_us"] = _latency(row["hist"])
    return out


def snapshot(run_dir: Path) -> list[dict[str, Any]]:
    """One dictionary a device, as --json prints it; latencies in microseconds, `since` in seconds since the epoch.

    Every device has what its daemon's control thread says of it; one that is connected has its counters as well.
    """
    found = {device["device"]: device for device in _counted(run_dir)}
    for daemon in daemons.running(run_dir):
        for said in daemons.read(run_dir, daemon, SUFFIX) or ():
            about = found.setdefault(said["device"], {"device": said["device"], "queues": [], "inflight": []})
            # What a daemon that has it says, comes before what one says that waits for it.
            if "state" not in about or said["connected"]:
                about |= said
    return [found[name] for name in sorted(found)]


def _counted(run_dir: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((run_dir / "stats").glob("*")):
        found = read_stats(path)
        if found is None:
            continue
        about, rows = found
        device = dict(about)
        device["queues"] = [_queue(row, q, about.get("kinds", KINDS)) for q, row in enumerate(rows)]
        requests = inflight(Path(device["journal"]), device["device"]) if device.get("journal") else ()
        device["inflight"] = [
            {"queue": r.queue, "operation": r.operation, "sector": r.sector, "seconds": r.seconds, "done": r.done}
            for r in requests
        ]
        yield device


def _text(device: dict[str, Any]) -> Iterator[str]:
    pages = device.get("grant_pages")
    most = "" if pages is None else f", at most {pages} pages mapped"
    disk = f"  {device['uri']}  policy {device['policy']}{most}" if "uri" in device else ""
    state = f"  {device['state']}" if "state" in device else ""
    yield f"{device['device']}{state}{disk}  pid {device['pid']}  in flight {len(device['inflight'])}"
    if device.get("error"):
        yield f"  error: {device['error']}"
    for kind, text in device.get("troubles", {}).items():
        yield f"  {kind}: {text}"
    if device.get("violations"):
        yield f"  the guest broke the protocol {device['violations']} time{'s' * (device['violations'] > 1)}"
    for q in device["queues"]:
        requests = ", ".join(f"{n} {name}" for name, n in q["requests"].items() if n)
        yield f"  queue {q['queue']}: {requests or 'no requests'}"
        yield (
            f"    {q['bytes_read'] / 1e6:.1f} MB read, {q['bytes_written'] / 1e6:.1f} MB written,"
            f" {q['errors']} errors, {q['violations']} violations, {q['replayed']} replayed"
        )
        yield (
            f"    notifications {q['notify_sent']} sent, {q['notify_saved']} saved, {q['events']} received,"
            f" {q['idle_events']} for nothing; grants"
            f" {q['grants_mapped']} mapped, {q['grants_copied']} copied, {q['persistent_hits']} reused,"
            f" {q['persistent_held']} held, {q['map_failures']} failed, {q['fallbacks']} fell back to copy"
            + (", all are copied for now" if q["copying"] else "")
        )
        for name, p in q["latency_us"].items():
            yield f"    {name} us: " + ", ".join(f"{label} {value:.1f}" for label, value in p.items())


def run(args: argparse.Namespace) -> int:
    """Print what there is. PvError if the run directory does not exist."""
    run_dir = Path(args.run_dir)
    if not run_dir.is_dir():
        raise PvError(f"{run_dir}: no such run directory; name the one of `pvdrivers serve` with --run-dir")
    devices = snapshot(run_dir)
    if args.json:
        if args.inflight:
            devices = [{"device": d["device"], "inflight": d["inflight"]} for d in devices]
        print(json.dumps(devices, indent=2))
        return 0
    if args.inflight:
        lines = [
            f"{d['device']}  queue {r['queue']}  {r['operation']} at sector {r['sector']}  {r['seconds']:.3f} s"
            + ("  done, not answered" if r["done"] else "")
            for d in devices
            for r in d["inflight"]
        ]
        print("\n".join(lines) if lines else "nothing is in flight")
        return 0
    for device in devices:
        print("\n".join(_text(device)))
    if not devices:
        print("no device is there")
    return 0
