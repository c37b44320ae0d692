"""Handshakes that do not end, and xenstored itself: stale directories, guests that never connect or vanish on the way,
a live update of xenstored, a connection to it that is lost. A neighbour under fio with verify notices nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import pytest

from pvdrivers import toolstack
from pvdrivers.troubles import SLOW_SECONDS
from pvdrivers.xenstore import XenStoreClient, default_path

from .guests import Guest, disk
from .lives import BACKENDS, Yard
from .stores import Stores, checksum
from .system import listing, read, sh, until


@pytest.fixture(scope="module")
def store() -> Iterator[XenStoreClient]:
    with XenStoreClient.connect(default_path()) as client:
        yield client


def paused(*disks: str) -> Guest:
    """A guest that xl has made and not let run."""
    return Guest(*disks, paused=True)


def test_a_guest_that_does_not_run_is_waited_for(here: Yard, stores: Stores) -> None:
    """Made paused, it has its disk in InitWait for as long as it likes, then connects; or goes as it came."""
    image = stores.file("disk", 16, random=True)
    with paused(disk(image)) as one:
        time.sleep(3)
        assert [found["state"] for found in here.devices(one.domid)] == ["InitWait"]
        one.xl("unpause")
        one.wait_ready()
        assert one.run("sha256sum < /dev/xvda").split()[0] == checksum(image)
        with paused(disk(stores.file("never", 16))) as never:
            domid = never.domid
            never.destroy()
            here.check_gone(domid)


def test_guests_that_do_not_answer_for_a_minute(here: Yard, guest: Callable[..., Guest], stores: Stores) -> None:
    """One that never connects, one that does not let go: named in the log once, and in stats as long as it lasts."""
    image = stores.file("slow", 16, random=True)
    keeps = guest(disk(stores.file("keeps", 16)), disk(stores.file("other", 16), "xvdb"))
    with paused(disk(image)) as slow:
        keeps.xl("pause")
        keeps.xl("block-detach", "xvdb", check=False)
        names = {
            f"vbd-{slow.domid}-51712": "its guest has not connected",
            f"vbd-{keeps.domid}-51728": "its guest has not let go of it",
        }
        domids = {slow.domid, keeps.domid}
        before = len(here.log())

        def troubles() -> dict[str, str]:
            rows = [row for domid in domids for row in here.devices(domid)]
            return {row["device"]: row["troubles"]["guest"] for row in rows if "guest" in row["troubles"]}

        wanted = {name: f"{text} for {SLOW_SECONDS:g} s; it is waited for" for name, text in names.items()}
        until(lambda: troubles() == wanted, SLOW_SECONDS + 30, "both are named, and nobody else", pause=0.5)
        here.check_unnoticed()
        said = sh(sys.executable, "-m", "pvdrivers", "stats", "--run-dir", here.serve.run_dir)
        log = here.log()[before:]
        for name, text in wanted.items():
            assert log.count(f"{name}: {text}") == 1, log
            assert text in said, said
        slow.xl("unpause")
        keeps.xl("unpause")
        slow.wait_ready()
        assert slow.run("sha256sum < /dev/xvda").split()[0] == checksum(image)
        until(lambda: not troubles(), 30, "they have answered, and stats say so")
        assert keeps.run("dd if=/dev/xvda of=/dev/null bs=4096 count=8 iflag=direct 2>&1; echo well").endswith("well")


def test_a_device_without_a_guest_that_answers(here: Yard, store: XenStoreClient, stores: Stores) -> None:
    """The directories are there, made by hand, and no frontend takes them up; they go in order."""
    with paused() as one:
        domid = one.domid
        made = [
            toolstack.attach_vbd(store, domid, f"xvd{letter}", str(stores.file(f"disk-{letter}", 8)))
            for letter in "bcdef"
        ]
        until(lambda: [one["state"] for one in here.devices(domid)] == ["InitWait"] * 5, 15, "all are offered")
        store.write(f"/local/domain/{domid}/device/vbd/51728/state", "nonsense")
        store.write(f"/local/domain/{domid}/device/vbd/51744/state", "3")  # Initialised, with no keys of a ring
        for path in made:
            # The one whose frontend has begun is waited for, and then taken away.
            begun = path.endswith("/51744")
            assert toolstack.detach(store, path, timeout=2 if begun else 10, force=True) is not begun, path
        until(lambda: here.devices(domid) == [], 10, "the daemon has let go of all")
        one.destroy()
        here.check_gone(domid)


@pytest.mark.parametrize("state", ["2", "3", "4"])
def test_a_domain_vanishes_in_its_handshake(here: Yard, stores: Stores, store: XenStoreClient, state: str) -> None:
    """Destroyed the moment that its frontend has said Initialised, that we have said Connected, or before both."""
    with paused(disk(stores.file("disk", 16)), disk(stores.file("other", 16), "xvdb")) as one:
        domid = one.domid
        path = {
            "2": f"/local/domain/{domid}/memory/target",  # is there at once
            "3": f"/local/domain/{domid}/device/vbd/51712/ring-ref",
            "4": f"/local/domain/{domid}/device/vbd/51728/ring-ref",
        }[state]
        one.xl("unpause")
        until(lambda: store.read(path), 60, path, pause=0.001)
        one.destroy()
        here.check_gone(domid)


def test_what_a_domain_left_behind_when_no_daemon_ran(here: Yard, store: XenStoreClient, stores: Stores) -> None:
    """Backend directories without a frontend, and with no domain at all, are there at the start of a daemon."""
    with paused() as one:
        here.serve.stop()
        gone, half = f"{BACKENDS}/31000/51712", f"{BACKENDS}/{one.domid}/51712"
        for path, domid in ((gone, 31000), (half, one.domid)):
            store.mkdir(path)
            for key, value in {
                "frontend": f"/local/domain/{domid}/device/vbd/51712", "frontend-id": domid, "online": 1,
                "params": stores.file(f"disk-{domid}", 8), "type": "phy", "mode": "w", "device-type": "disk",
                "state": 4,
            }.items():  # fmt: skip
                store.write(f"{path}/{key}", value if isinstance(value, int) else str(value))
        before = len(here.log())
        here.serve.start()
        until(lambda: store.read(f"{gone}/state") is None, 20, "what a domain left that is gone, is removed")
        until(lambda: read(f"{half}/state") == "6", 20, "what has no frontend, is closed")
        said = here.log()[before:]
        assert said.count("its domain is gone; the directory that it left is removed") == 1, said
        assert said.count("it has no frontend") == 1, said
        assert "31000" not in listing(BACKENDS)
        domid = one.domid
        store.rm(f"{BACKENDS}/{domid}")
        one.destroy()
        here.check_gone(domid)


def test_xenstored_is_updated_live(here: Yard, guest: Callable[..., Guest], stores: Stores) -> None:
    """It executes itself anew, with all connections and watches; the daemon hears of new disks as before."""
    pid = sh("pidof", "xenstored").strip()
    for number in range(2):
        print(sh("xenstore-control", "live-update", "/usr/lib/xen-4.17/bin/xenstored", seconds=60))
        here.check_unnoticed()
        image = stores.file(f"disk-{number}", 16, random=True)
        one = guest(disk(image))
        assert one.run("sha256sum < /dev/xvda").split()[0] == checksum(image)
        domid = one.domid
        one.destroy()
        here.check_gone(domid)
    assert sh("pidof", "xenstored").strip() == pid
    assert "xenstore is lost" not in here.log()


def test_the_connection_to_xenstored_is_lost(here: Yard, guest: Callable[..., Guest], stores: Stores) -> None:
    """What is connected is served on; what came and went meanwhile, is found when the connection is back."""
    image = stores.file("disk", 16, random=True)
    goes = guest(disk(stores.file("goes", 16)))
    gone = goes.domid
    here.relay.cut()
    here.check_unnoticed()
    goes.destroy()
    with paused() as comes:
        with pytest.raises(Exception, match="unable to add disk|failed"):
            comes.xl("block-attach", disk(stores.file("never", 8), "xvdc"))
        here.check_unnoticed()
        here.relay.join()
        until(lambda: "xenstore is back" in here.log(), 20, "the daemon has a new connection")
        here.check_gone(gone)
        comes.xl("block-attach", disk(image))
        assert here.devices(comes.domid)[0]["state"] == "InitWait"
        comes.xl("unpause")
        comes.wait_ready()
        assert comes.run("sha256sum < /dev/xvda").split()[0] == checksum(image)
    assert here.log().count("the connection to xenstore is lost") == 1
