"""What can go wrong on a real Xen: devices that are not there, limits that are reached, guests that write nonsense or
notify without end. It is said once, counted, and no other guest notices.

A quota of xenstore's cannot be reached here: dom0 has none. tests/device/test_quotas.py has what a driver domain meets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pvdrivers import toolstack
from pvdrivers.cli.stats import snapshot
from pvdrivers.worker import storm
from pvdrivers.xenbus import XenbusState
from pvdrivers.xenstore import XenStoreClient, default_path

from .guests import Guest, disk
from .serve import Serve
from .stores import Stores, checksum
from .system import CommandError, read, sh, until

GNTDEV = Path("/dev/xen/gntdev")
GNTDEV_LIMIT = Path("/sys/module/xen_gntdev/parameters/limit")
GNTALLOC_LIMIT = Path("/sys/module/xen_gntalloc/parameters/limit")


@pytest.fixture(scope="module")
def daemon(module_serve: Callable[..., Serve]) -> Serve:
    """One daemon for all tests of this file."""
    return module_serve()


@pytest.fixture(scope="module")
def one(module_guest: Callable[..., Guest], tmp_path_factory: pytest.TempPathFactory, daemon: Serve) -> Iterator[Guest]:
    """The neighbour: a guest with a disk that keeps pages mapped, and one that maps each for its request."""
    with Stores(tmp_path_factory.mktemp("neighbour")) as made:
        kept, each = made.file("kept", 16), made.file("each", 16)
        yield module_guest(
            disk(kept, "xvda"),
            disk(f"{each},policy=map,direct=no", "xvdb"),
            extra="xen_blkfront.max_ring_page_order=4",
        )


@pytest.fixture(scope="module")
def store() -> Iterator[XenStoreClient]:
    with XenStoreClient.connect(default_path()) as client:
        yield client


def stats(daemon: Serve) -> dict[str, dict[str, Any]]:
    """What `pvdrivers stats --json` says, by device."""
    return {row["device"]: row for row in snapshot(daemon.run_dir)}


def counted(row: dict[str, Any], key: str) -> int:
    """A counter, of all queues together."""
    return sum(queue[key] for queue in row["queues"])


def fio(vdev: str, *, rounds: int = 1) -> str:
    """Write and read back, so many times; its figures as JSON."""
    return (
        f"fio --output-format=json --name={vdev} --filename=/dev/{vdev} --rw=randwrite --bs=16k --size=4m"
        f" --ioengine=io_uring --direct=1 --iodepth=8 --verify=crc32c --verify_fatal=1 --loops={rounds}"
    )


def slowest(output: str) -> dict[str, float]:
    """Seconds that its requests took: half of them, all but one of a hundred, all."""
    job = json.loads(output[output.index("{") : output.rindex("}") + 1])["jobs"][0]
    assert job["error"] == 0, output
    figures = [job[kind]["clat_ns"] for kind in ("read", "write") if job[kind]["total_ios"]]
    percentiles = {name: max(f["percentile"][name] for f in figures) for name in ("50.000000", "99.000000")}
    return {
        "half": percentiles["50.000000"] / 1e9,
        "p99": percentiles["99.000000"] / 1e9,
        "all": max(f["max"] for f in figures) / 1e9,
    }


@contextmanager
def misbehaving(verb: str, *words: str, says: str) -> Iterator[subprocess.Popen[str]]:
    """A program of tests.xen.peers that has begun; killed in the end."""
    program = [sys.executable, "-m", "tests.xen.peers", verb, *words]
    process = subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(says), f"{verb}: {line!r}, status {process.poll()}"
        print(f"{verb}: {line.strip()}")
        yield process
    finally:
        process.kill()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()


# What this host lacks


def refused(*words: str) -> str:
    """What a command said that had to fail."""
    with pytest.raises(CommandError) as error:
        sh(*words, seconds=120)
    assert "Traceback" not in error.value.output, error.value.output
    return error.value.output


def test_no_gntdev(tmp_path: Path) -> None:
    away = GNTDEV.with_name("gntdev-away")
    GNTDEV.rename(away)
    try:
        said = refused(sys.executable, "-m", "pvdrivers", "serve", "--run-dir", str(tmp_path / "run"))
        assert "there is no /dev/xen/gntdev: modprobe -a xen-gntdev" in said
        said = refused(sys.executable, "-m", "pvdrivers", "check")
        assert "no /dev/xen/gntdev: pages of guests" in said and "modprobe xen-gntdev" in said
        assert "pvdrivers cannot run here without: xen gntdev" in said
    finally:
        away.rename(GNTDEV)


def test_no_permission(tmp_path: Path) -> None:
    """For a root that may not override permissions, as in a unit with fewer capabilities."""
    mode = GNTDEV.stat().st_mode
    GNTDEV.chmod(0)
    try:
        bounded = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--",
                   sys.executable, "-m", "pvdrivers")  # fmt: skip
        began = time.monotonic()
        said = refused(*bounded, "serve", "--run-dir", str(tmp_path / "run"))
        assert "/dev/xen/gntdev: Permission denied; run as root, or give the service's user this device" in said
        print(f"serve said so after {time.monotonic() - began:.1f} s")
        assert "/dev/xen/gntdev is not ours to use" in refused(*bounded, "check")
    finally:
        GNTDEV.chmod(mode)


# Limits


def test_no_mapping_is_left(one: Guest, daemon: Serve, stores: Stores) -> None:
    """Xen's maptrack is used up: what is connected is copied, what would connect waits until there is room again."""
    GNTALLOC_LIMIT.write_text("32768")
    names = {vdev: f"vbd-{one.domid}-{toolstack.devid_of(vdev)}" for vdev in ("xvda", "xvdb", "xvdc")}
    one.run("dd if=/dev/xvda of=/dev/null bs=4096 count=8 iflag=direct 2>&1")
    image = stores.file("late", 8, random=True)
    with misbehaving("hog", says="holding"):
        for vdev in ("xvda", "xvdb"):
            one.run(fio(vdev), seconds=120)
        rows = stats(daemon)
        for vdev in ("xvda", "xvdb"):
            row = rows[names[vdev]]
            assert counted(row, "fallbacks") > 0 and counted(row, "grants_copied") > 0, row
            assert counted(row, "map_failures") == 0 and counted(row, "errors") == 0, row
        log = daemon.log.read_text()
        for vdev in ("xvda", "xvdb"):
            said = [line for line in log.splitlines() if f"{names[vdev]}: Xen has no room for more mapped" in line]
            assert len(said) == 1 and "raise gnttab_max_maptrack_frames" in said[0], log[-3000:]
        one.xl("block-attach", disk(image, "xvdc"), check=False)
        error = until(lambda: stats(daemon)[names["xvdc"]].get("error"), 20, "xvdc cannot connect")
        assert "gnttab_max_maptrack_frames" in error
    until(lambda: stats(daemon)[names["xvdc"]]["connected"], 90, "xvdc connects when there is room")
    assert not stats(daemon)[names["xvdc"]]["error"]
    one.run("until [ -b /dev/xvdc ]; do usleep 100000; done", seconds=30)
    assert one.run("sha256sum < /dev/xvdc").split()[0] == checksum(image)
    assert daemon.log.read_text().count(f"{names['xvdc']}: {error}") == 1
    one.xl("block-detach", "xvdc")


def test_gntdev_maps_fewer_pages_at_once(one: Guest, daemon: Serve, stores: Stores) -> None:
    """Its limit is that of one mapping: a larger ring cannot be mapped, and the message says what to raise."""
    image = stores.file("rings", 8, random=True)
    name = f"vbd-{one.domid}-{toolstack.devid_of('xvdc')}"
    before = GNTDEV_LIMIT.read_text()
    GNTDEV_LIMIT.write_text("8")
    try:
        one.xl("block-attach", disk(f"{image},ring_order=4", "xvdc"), check=False)
        error = until(lambda: stats(daemon)[name].get("error"), 20, "xvdc cannot connect")
        assert f"raise {GNTDEV_LIMIT}" in error and "16" in error and "8" in error, error
    finally:
        GNTDEV_LIMIT.write_text(before)
    until(lambda: stats(daemon)[name]["connected"], 90, "xvdc connects when the limit is as it was")
    GNTDEV_LIMIT.write_text("8")
    try:
        one.run(fio("xvdc"), seconds=120)
    finally:
        GNTDEV_LIMIT.write_text(before)
    row = stats(daemon)[name]
    assert counted(row, "errors") == counted(row, "fallbacks") == 0 and counted(row, "grants_mapped") > 0, row
    one.xl("block-detach", "xvdc")


# Guests


@contextmanager
def nobodys(store: XenStoreClient, image: Path, vdev: str) -> Iterator[tuple[str, str, str]]:
    """A disk of dom0, where nothing drives it but the test: name, backend's directory, frontend's."""
    backend = toolstack.attach_vbd(store, 0, vdev, str(image))
    frontend = toolstack.device_paths("vbd", 0, toolstack.devid_of(vdev))[1]
    try:
        yield f"vbd-0-{toolstack.devid_of(vdev)}", backend, frontend
    finally:
        toolstack.detach(store, backend, timeout=20, force=True, at_once=True)


def test_a_guest_writes_nonsense(one: Guest, daemon: Serve, store: XenStoreClient, stores: Stores) -> None:
    neighbour = one.start(fio("xvda", rounds=6))
    nonsense: list[tuple[dict[str, str], str]] = [
        ({"ring-ref": "banana", "event-channel": "7"}, "ring-ref is 'banana', not a number"),
        ({"ring-ref": "4294967295", "event-channel": "7"}, "grant reference 4294967295 of domain 0 cannot be mapped"),
        ({"ring-ref": "8", "event-channel": "-1"}, "event-channel is '-1'"),
        ({"ring-ref": "8", "event-channel": "7", "protocol": "x86_128-abi"}, "protocol 'x86_128-abi' is not one of"),
        ({"ring-page-order": "99", "event-channel": "7"}, "ring-page-order is '99', not from 0 to 4"),
        ({"multi-queue-num-queues": "0"}, "multi-queue-num-queues is '0'"),
        ({"state": "connected, honestly"}, "frontend state is 'connected, hones'"),
    ]
    with nobodys(store, stores.file("nonsense", 4), "xvdy") as (name, backend, frontend):
        for keys, wanted in nonsense:
            for key in ("ring-ref", "event-channel", "protocol", "ring-page-order", "multi-queue-num-queues"):
                store.rm(f"{frontend}/{key}")
            store.write(f"{frontend}/state", 1)
            until(lambda: read(f"{backend}/state") == "2", 30, f"a backend that waits, before {keys}")
            for key, value in {"state": "3", **keys}.items():
                if key != "state":
                    store.write(f"{frontend}/{key}", value)
            store.write(f"{frontend}/state", keys.get("state", "3"))
            until(lambda wanted=wanted: wanted in stats(daemon)[name]["error"], 20, f"{wanted!r} for {keys}")
            # What an honest frontend would do with a backend that closes.
            store.write(f"{frontend}/state", 6)
            until(lambda: read(f"{backend}/state") == "6", 20, f"a backend that has closed, after {keys}")
        row = stats(daemon)[name]
        assert row["violations"] == len(nonsense) - 1, row  # a grant that is not there is no breach: it may have ended
    slowest(neighbour.wait(120))
    log = daemon.log.read_text()
    assert log.count("ring-ref is 'banana'") == 1 and "Traceback" not in log and "our own fault" not in log, log[-4000:]
    assert daemon.alive()


def test_a_guest_changes_its_state_without_end(
    one: Guest, daemon: Serve, store: XenStoreClient, stores: Stores
) -> None:
    neighbour = one.start(fio("xvda", rounds=4))
    with nobodys(store, stores.file("states", 4), "xvdy") as (name, _, frontend):
        until(lambda: stats(daemon).get(name, {}).get("state") == "InitWait", 20, "the backend waits, and stats say so")
        end = time.monotonic() + 30
        while not stats(daemon)[name]["counts"].get("storm") and time.monotonic() < end:
            for _ in range(20):
                for state in (3, 1, 5, 6, 1):
                    store.write(f"{frontend}/state", state)
        assert stats(daemon)[name]["counts"]["storm"] >= 1, stats(daemon)[name]
        store.write(f"{frontend}/state", 1)
    print("neighbour:", slowest(neighbour.wait(120)))
    assert daemon.log.read_text().count(f"{name}: its frontend's state changes too often") == 1
    until(lambda: name not in stats(daemon), 20, "it can be taken away")


def test_a_guest_notifies_without_end(
    one: Guest, daemon: Serve, store: XenStoreClient, stores: Stores
) -> None:
    """To its neighbour that is what it costs when somebody takes a processor of dom0, and not much more."""
    with misbehaving("burn", says="burning"):
        busy = slowest(one.run(fio("xvda"), seconds=120))
    devid = toolstack.devid_of("xvdy")
    with nobodys(store, stores.file("storm", 4), "xvdy") as (name, backend, _):
        wanted = (XenbusState.InitWait,)
        assert toolstack.wait_for(store, backend, wanted, 20) in wanted
        with misbehaving("storm", str(devid), says="storming"):
            noisy = slowest(one.run(fio("xvda"), seconds=180))
            before, began = counted(stats(daemon)[name], "idle_events"), time.monotonic()
            time.sleep(5)
            row = stats(daemon)[name]
            rate = (counted(row, "idle_events") - before) / (time.monotonic() - began)
            said = row["troubles"].get("events", "")
            print(f"busy: {busy}\nstorm: {noisy}\nevents: {counted(row, 'events')}, {rate:.0f} a second: {said}")
            # An emulated machine that shares its processors may not bring as many as make a storm.
            assert said or rate <= storm.MOST, row
            assert row["connected"] and counted(row, "events") > 100, row
        if said:
            assert said.startswith("its guest sends events with nothing behind them") and "let in 10 times" in said
            until(lambda: not stats(daemon)[name]["troubles"], 30, "the storm is over when its guest is")
            assert stats(daemon)[name]["counts"]["events"] >= 1
            log = [line.partition(f"{name}: ")[2] for line in daemon.log.read_text().splitlines() if name in line]
            assert log.count(said) == 1 and "its guest sends no events without end any more" in log, log
    assert not row["error"] and counted(row, "violations") == 0
    assert noisy["half"] < 10 * busy["half"] + 0.05 and noisy["all"] < 10 * busy["all"] + 1, (busy, noisy)
    until(lambda: name not in stats(daemon), 20, "it can be taken away")


def test_directories_that_were_left_behind(one: Guest, daemon: Serve, store: XenStoreClient) -> None:
    top = "/local/domain/0/backend/vbd"
    gone, here = f"{top}/31000/51712", f"{top}/{one.domid}/{toolstack.devid_of('xvdz')}"
    for path in (gone, here):
        domid, devid = path.split("/")[-2:]
        front = f"/local/domain/{domid}/device/vbd/{devid}"
        keys = {"frontend": front, "frontend-id": domid, "params": "/none", "mode": "w", "state": "4"}
        for key, value in keys.items():
            store.write(f"{path}/{key}", value)
    try:
        until(lambda: read(f"{gone}/state") is None, 20, "what a domain left behind is removed")
        name = f"vbd-{one.domid}-{toolstack.devid_of('xvdz')}"
        row = until(lambda: (r := stats(daemon).get(name)) and r["troubles"].get("stale") and r, 20, "it is stale")
        assert "it has no frontend" in row["troubles"]["stale"]
        log = daemon.log.read_text()
        assert log.count("vbd-31000-51712: its domain is gone") == 1 and log.count(f"{name}: it has no frontend") == 1
    finally:
        store.rm(here)
    until(lambda: name not in stats(daemon), 20, "it goes with its directory")
    one.run(fio("xvdb"), seconds=60)
    assert daemon.alive() and os.path.exists(GNTDEV)
