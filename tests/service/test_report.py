"""``pvdrivers stats`` of what is not connected: each device with its state and its troubles."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pvdrivers.cli.stats import snapshot
from pvdrivers.sim import toolstack
from tests.hostile_frontend import CONNECTED, Frontend
from tests.restart.bed import Bed, until
from tests.service.conftest import cli


def stats(bed: Bed) -> dict[str, dict[str, Any]]:
    return {device["device"]: device for device in json.loads(json.dumps(snapshot(bed.run_dir)))}


def test_every_device_is_shown(bed: Callable[..., Bed], tmp_path: Path) -> None:
    b = bed("--domain", *map(str, range(1, 20)))
    b.serve()
    store = b.dom0.store
    with ExitStack() as stack:
        guest = Frontend(b.run_dir, b.dom0, "memory:1M", memory_mib=4)
        stack.callback(guest.destroy)
        name = f"vbd-{guest.domid}-51712"
        until(lambda: stats(b).get(name, {}).get("state") == "InitWait")
        offered = stats(b)[name]
        assert (offered["connected"], offered["error"], offered["troubles"], offered["queues"]) == (False, "", {}, [])
        guest.connect()
        until(lambda: stats(b)[name]["state"] == "Connected")
        device = stats(b)[name]
        assert device["connected"] and device["uri"] == "memory:1M" and len(device["queues"]) == 1
        assert offered["since"] <= device["since"]

        # One that cannot be served, one that belongs to somebody else, one that is a lie.
        missing = toolstack.attach_vbd(store, guest.domid, "xvdb", str(tmp_path / "none.img"))
        until(lambda: "no such file" in stats(b).get(f"vbd-{guest.domid}-51728", {}).get("error", ""))
        store.write("/local/domain/0/backend/vbd/7/1/frontend", "/local/domain/8/device/vbd/1")
        store.write("/local/domain/0/backend/vbd/7/1/state", 1)
        until(lambda: stats(b).get("vbd-7-1", {}).get("state") == "refused")
        assert "not below /local/domain/7" in stats(b)["vbd-7-1"]["error"]
        assert set(json.loads(cli(b, "stats", "--json").stdout)[0]) >= {"device", "state", "queues"}
        text = cli(b, "stats").stdout
        assert "vbd-7-1  refused" in text and "no such file" in text and f"{name}  Connected  memory:1M" in text
        store.rm("/local/domain/0/backend/vbd/7")
        until(lambda: "vbd-7-1" not in stats(b))
        toolstack.detach(store, missing)
        until(lambda: f"vbd-{guest.domid}-51728" not in stats(b))

        # A guest that lies is counted, one that reconnects is not forgiven.
        guest.say("nonsense")
        until(lambda: stats(b)[name]["violations"] == 1)
        assert "frontend state is 'nonsense'" in stats(b)[name]["error"]
        assert "the guest broke the protocol 1 time" in cli(b, "stats").stdout


def test_a_device_of_another_daemon(bed: Callable[..., Bed]) -> None:
    b = bed()
    b.serve()
    with ExitStack() as stack:
        for _ in range(2):
            guest = Frontend(b.run_dir, b.dom0, "memory:1M", memory_mib=4)
            stack.callback(guest.destroy)
        first = f"vbd-{guest.domid}-51712"
        guest.connect()
        until(lambda: stats(b).get(first, {}).get("connected"))
        words = b.words
        b.words = ("--domain", str(guest.domid), "9")
        other = toolstack.create_domain(b.dom0, memory_mib=4)
        assert other.domid != 9
        second = subprocess_daemon(b, stack)
        b.words = words
        until(lambda: second.popen.poll() is not None)
        assert stats(b)[first]["connected"], "what the one that serves it says comes first"
        assert guest.backend() == CONNECTED


def subprocess_daemon(bed: Bed, stack: ExitStack) -> Any:
    """One more daemon on the same directory, ended with the test."""
    from tests.restart.bed import Process

    found = Process("serve", "--run-dir", str(bed.run_dir), *bed.words, log=bed.log)
    stack.callback(found.end)
    return found
