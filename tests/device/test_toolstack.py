"""What xl does with devices: attached, found, detached, without ever following what a guest wrote."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvdrivers import toolstack
from pvdrivers.errors import ConfigError, PlatformError
from pvdrivers.xenbus import XenbusState as S
from pvdrivers.xenstore import XenStoreClient
from tests.xenstore.conftest import Served

BACK = "/local/domain/0/backend/pvblk/5/51728"
FRONT = "/local/domain/5/device/vbd/51728"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[XenStoreClient]:
    served = Served(tmp_path / "s")
    with served.client() as client:
        for domid, name in ((0, "Domain-0"), (5, "web"), (6, "mail")):
            client.write(f"/local/domain/{domid}/name", name)
        yield client
    served.close()


def test_a_disk_of_our_own_kind(store: XenStoreClient) -> None:
    backend = toolstack.attach_vbd(store, 5, "xvdb", "/disk.img", kind="pvblk", mode="r", be={"direct-io-safe": 1})
    assert backend == BACK
    assert store.read(f"{BACK}/frontend") == FRONT.encode() and store.read(f"{FRONT}/backend") == BACK.encode()
    assert store.get_perms(f"{BACK}/state") == ["n0", "r5"] and store.get_perms(f"{FRONT}/state") == ["n5", "r0"]
    assert store.read(f"{BACK}/direct-io-safe") == b"1"
    (disk,) = toolstack.disks(store, 5)
    assert (disk.backend, disk.kind, disk.name, disk.mode, disk.target) == (BACK, "pvblk", "xvdb", "r", "/disk.img")
    assert (disk.state, disk.front_state, disk.ring_ref, disk.queues) == (S.Initialising, "1", "", 1)
    assert not disk.made_by_xl


def test_one_device_has_one_backend(store: XenStoreClient) -> None:
    toolstack.attach_vbd(store, 5, "xvdb", "/disk.img")
    with pytest.raises(PlatformError, match=r"attached already \(/local/domain/0/backend/vbd/5/51728\)"):
        toolstack.attach_vbd(store, 5, "xvdb", "/disk.img", kind="pvblk")
    store.rm("/local/domain/0/backend/vbd/5/51728")  # what xl leaves of the frontend is no hindrance
    toolstack.attach_vbd(store, 5, "xvdb", "/disk.img", kind="pvblk")


@pytest.mark.parametrize("said", ["/local/domain/0/backend/vbd/6/51712", "/x y", "../..", "", "/local/domain/0"])
def test_what_the_guest_says_leads_nowhere(store: XenStoreClient, said: str) -> None:
    other = toolstack.attach_vbd(store, 6, "xvda", "/other.img")
    store.write(f"{FRONT}/backend", said)
    backend = toolstack.attach_vbd(store, 5, "xvdb", "/disk.img", kind="pvblk")
    store.write(f"{FRONT}/backend", said)
    assert [disk.backend for disk in toolstack.disks(store, 5)] == [backend]
    toolstack.detach(store, backend, force=True, timeout=0.1)
    assert store.read(f"{other}/state") == b"1" and store.read(f"{other}/online") == b"1"


def test_a_backend_directory_that_names_another_domain(store: XenStoreClient) -> None:
    backend = toolstack.attach_vbd(store, 5, "xvdb", "/disk.img", kind="pvblk")
    theirs = "/local/domain/6/device/vbd/51712"
    store.write(f"{theirs}/state", 4)
    store.write(f"{backend}/frontend", theirs)
    toolstack.detach(store, backend, force=True, at_once=True, timeout=0.1)
    assert store.read(f"{theirs}/state") == b"4" and store.ls(backend) is None


def test_queues_and_hostile_text(store: XenStoreClient) -> None:
    toolstack.attach_vbd(store, 5, "xvdb", "/disk.img", kind="pvblk")
    for key, value in {
        "state": b"4\x1b[2J", "multi-queue-num-queues": b"2", "queue-0/ring-ref0": b"8", "queue-0/event-channel": b"9",
    }.items():  # fmt: skip
        store.write(f"{FRONT}/{key}", value)
    (disk,) = toolstack.disks(store, 5)
    assert (disk.queues, disk.ring_ref, disk.event_channel, disk.front_state) == (2, "8", "9", "4?[2J")
    store.write(f"{FRONT}/multi-queue-num-queues", b"\xb2" * 3000)
    assert toolstack.disks(store, 5)[0].queues == 1


def test_disks_of_other_backends(store: XenStoreClient) -> None:
    toolstack.attach_vbd(store, 5, "xvda", "/a")
    store.write("/libxl/5/device/vbd/51712/backend", "/local/domain/0/backend/vbd/5/51712")
    toolstack.attach_vbd(store, 5, "xvdb", "/b", kind="pvblk", backend_domid=6)
    found = toolstack.disks(store, 5)
    assert [(d.kind, d.backend_domid, d.made_by_xl) for d in found] == [("vbd", 0, True), ("pvblk", 6, False)]
    assert store.get_perms("/local/domain/6/backend/pvblk/5/51728/state") == ["n6", "r5"]


@pytest.mark.parametrize(("text", "domid"), [("web", 5), ("5", 5), ("Domain-0", 0), ("0", 0)])
def test_domains(store: XenStoreClient, text: str, domid: int) -> None:
    assert toolstack.find_domain(store, text) == domid


@pytest.mark.parametrize("text", ["7", "wob", "", "-1", "32752", "\u0665"])
def test_no_such_domain(store: XenStoreClient, text: str) -> None:
    with pytest.raises(ConfigError, match="there is none"):
        toolstack.find_domain(store, text)


def test_waiting(store: XenStoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = toolstack.attach_vbd(store, 5, "xvdb", "/disk.img", kind="pvblk")
    assert toolstack.wait_for(store, backend, (S.InitWait,), 0.05) is S.Initialising
    timer = threading.Timer(0.1, lambda: store.write(f"{backend}/state", 2))
    timer.start()
    assert toolstack.wait_for(store, backend, (S.InitWait,), 10) is S.InitWait
    timer.join()
    store.write(f"{backend}/hotplug-status", "error")
    store.write(f"{backend}/hotplug-error", "no such file")
    monkeypatch.setattr(toolstack, "_SECOND_TRY_S", 0.05)
    assert toolstack.wait_for(store, backend, (S.Connected,), 10) is S.InitWait, "it does not wait ten seconds for that"
    assert toolstack.what_it_said(store, backend) == "no such file"
    store.rm(f"{backend}/hotplug-error")
    store.write("/local/domain/0/error/backend/pvblk/5/51728/error", "22 what Linux says")
    assert toolstack.what_it_said(store, backend) == "what Linux says"


def test_detached_at_once(store: XenStoreClient) -> None:
    """The guest's directory goes before the backend hears of it, so that nobody is waited for."""
    backend = toolstack.attach_vbd(store, 5, "xvdb", "/disk.img", kind="pvblk")
    store.write(f"{backend}/state", 4)
    assert not toolstack.detach(store, backend, at_once=True, timeout=0.1)
    assert store.read(f"{FRONT}/state") is None and store.read(f"{backend}/state") == b"5"
    assert store.read(f"{backend}/online") == b"0"
    store.write(f"{backend}/state", 6)
    assert toolstack.detach(store, backend) and store.ls(backend) is None


def test_a_disk_of_a_domain_that_is_gone(store: XenStoreClient) -> None:
    """Nobody told its backend, which may be in a domain that cannot see that: it is for the operator to detach."""
    backend = toolstack.attach_vbd(store, 6, "xvdb", "/disk.img", kind="pvblk")
    store.rm("/local/domain/6")
    with pytest.raises(ConfigError, match="there is none"):
        toolstack.find_domain(store, "6")
    assert toolstack.find_domain(store, "6", left=True) == 6
    store.write(f"{backend}/state", int(S.Closed))
    assert toolstack.detach(store, backend, timeout=1)
    with pytest.raises(ConfigError):
        toolstack.find_domain(store, "6", left=True)
