"""fio beside us: the same requests on the same file, by io_uring, in fio's default form."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..machine import Missing, on_cpus, program

__all__ = ["Job", "figures", "present", "run"]


@dataclass(frozen=True)
class Job:
    """What fio does. `rw` in fio's words: randread, read, write."""

    path: Path
    rw: str
    block_size: int
    depth: int
    direct: bool = True


def present() -> None:
    """Raises Missing without fio."""
    program("fio", "fio")


def run(job: Job, seconds: float, cpus: Collection[int] | None = None) -> dict[str, Any]:
    """One run, with the figures that an agent answers. Raises Missing without fio, RuntimeError if it fails."""
    command = [
        program("fio", "fio"), "--name=peer", f"--filename={job.path}", "--allow_file_create=0",
        "--ioengine=io_uring", f"--direct={int(job.direct)}", f"--rw={job.rw}", f"--bs={job.block_size}",
        f"--iodepth={job.depth}", "--time_based",
        # Below one second fio takes no notice of the time and does the whole file.
        f"--runtime={max(1, math.ceil(seconds))}",
        # Ours draws any block each time, too, and keeps no map of what it has visited.
        "--norandommap", "--randrepeat=0", "--invalidate=0", "--output-format=json",
    ]  # fmt: skip
    with on_cpus(cpus):
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        if "io_uring" in said and "not" in said:
            raise Missing(f"this fio has no io_uring: {said.splitlines()[0]}")
        raise RuntimeError(f"fio ended with {done.returncode}: {said}")
    return figures(json.loads(done.stdout[done.stdout.index("{") :]))


def figures(document: dict[str, Any]) -> dict[str, Any]:
    """What fio's JSON says of its one job, in an agent's words."""
    job = document["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio: its job ended with error {job['error']}")
    side = max((job["read"], job["write"]), key=lambda s: int(s["total_ios"]))
    latency = side["clat_ns"]
    requests = int(side["total_ios"])
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    return {
        "rate": float(side["iops"]),
        "bytes_per_second": float(side["bw_bytes"]),
        "requests": requests,
        "seconds": side["runtime"] / 1000,
        "p50_us": latency["percentile"]["50.000000"] / 1000,
        "p99_us": latency["percentile"]["99.000000"] / 1000,
        "mean_us": latency["mean"] / 1000,
        "cpu_us": cpu / requests * 1e6 if requests else None,
    }
