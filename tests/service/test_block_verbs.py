"""``pvdrivers block-attach``, ``block-detach`` and ``block-list``, on the embedded Xen with a daemon and guests."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pvdrivers.sim import toolstack
from tests.restart.bed import Bed, until
from tests.service.conftest import cli
from tests.service.verbs import Guest, fails


@pytest.fixture
def guest(shared: Bed, request: pytest.FixtureRequest) -> Iterator[Guest]:
    with ExitStack() as stack:
        yield Guest(shared, stack, f"web-{request.node.name}")


@pytest.fixture
def image(shared: Bed, tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\x5a" * (1 << 20))
    return path


def test_a_disk_comes_and_goes(shared: Bed, guest: Guest, image: Path) -> None:
    done = cli(shared, "block-attach", guest.name, f"{image},,xvdb,w,queues=2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"xvdb: attached to domain {guest.domid}, InitWait; the guest has not connected yet\n"
    disk = guest.disk(51728)
    assert bytes(disk.read(0, 512)) == b"\x5a" * 512
    lines = cli(shared, "block-list", str(guest.domid)).stdout.splitlines()
    assert lines[0].split()[:7] == ["Vdev", "BE", "handle", "state", "evt-ch", "ring-ref", "BE-path"]
    words = lines[1].split()
    assert words[:4] == ["51728", "0", str(guest.domid), "4"]
    assert words[6:] == [f"/local/domain/0/backend/pvblk/{guest.domid}/51728", "xvdb", "w", "Connected", "1",
                         f"{image},queues=2"]  # fmt: skip
    fails(cli(shared, "block-attach", guest.name, f"{image},,xvdb"), "attached already", "detach it first")
    assert bytes(disk.read(0, 512)) == b"\x5a" * 512, "a second try does no harm"

    # In use in the guest: it says so, and comes back when the guest lets go.
    disk.close()
    done = cli(shared, "block-detach", guest.name, "xvdb")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"xvdb: detached from domain {guest.domid}\n", "")
    assert len(cli(shared, "block-list", guest.name).stdout.splitlines()) == 1
    store = shared.dom0.store
    assert store.ls(f"/local/domain/0/backend/pvblk/{guest.domid}") is None
    assert store.ls(f"/local/domain/{guest.domid}/device/vbd/51728") is None
    fails(cli(shared, "block-detach", guest.name, "xvdb"), f"domain {guest.domid} has no disk xvdb; it has: none")


def test_with_connect_the_guest_is_waited_for(shared: Bed, guest: Guest) -> None:
    command = [*("block-attach", "--connect", "--timeout", "3", guest.name), "memory:1M,,xvdb"]
    done = cli(shared, *command)
    fails(done, "xvdb of domain", "the guest has not connected within 3 s: its state is 1")
    assert shared.dom0.store.ls(f"/local/domain/0/backend/pvblk/{guest.domid}") is None, "nothing is left"
    command[3] = "20"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cli, shared, *command)
        until(lambda: shared.dom0.store.read(f"/local/domain/{guest.domid}/device/vbd/51728/state"))
        disk = guest.disk(51728)
        done = waiting.result(30)
    assert done.stdout == f"xvdb: attached to domain {guest.domid}, Connected\n", done.stderr
    disk.close()
    assert cli(shared, "block-detach", guest.name, "xvdb").returncode == 0


def test_what_the_backend_says_is_shown(shared: Bed, guest: Guest, tmp_path: Path) -> None:
    fails(cli(shared, "block-attach", guest.name, f"{tmp_path}/none.img,,xvdb"), "xvdb of domain",
          f"{tmp_path}/none.img: there is no such file")  # fmt: skip
    assert shared.dom0.store.ls(f"/local/domain/{guest.domid}/device/vbd/51728") is None, "nothing is left"
    fails(cli(shared, "block-attach", guest.name, "/x,qcow2,xvdb"), "only raw disks are served")
    fails(cli(shared, "block-attach", "nobody", "/x,,xvdb"), "domain 'nobody': there is none of that name", guest.name)
    fails(cli(shared, "block-attach", guest.name, "/x,,xvdb,backend=nobody"), "domain 'nobody'")


def test_a_guest_that_does_not_let_go(shared: Bed, guest: Guest, image: Path) -> None:
    assert cli(shared, "block-attach", guest.name, f"{image},,xvdb").returncode == 0
    disk = guest.disk(51728)
    # An honest frontend closes when it is asked: this one is deaf.
    disk._watches.close()
    done = cli(shared, "block-detach", "--timeout", "1", guest.name, "xvdb")
    fails(done, "not let go within 1 s: backend Closing, frontend state 4", "--force")
    assert bytes(disk.read(0, 512)) == b"\x5a" * 512, "and it is served meanwhile"
    done = cli(shared, "block-detach", "--force", guest.name, "xvdb")
    assert done.returncode == 0, done.stderr
    assert shared.dom0.store.ls(f"/local/domain/0/backend/pvblk/{guest.domid}") is None
    disk.close()


def test_a_disk_that_xl_attached(shared: Bed, guest: Guest) -> None:
    backend = toolstack.attach_vbd(shared.dom0.store, guest.domid, "xvda", "memory:1M")
    shared.dom0.store.write(f"/libxl/{guest.domid}/device/vbd/51712/backend", backend)
    fails(cli(shared, "block-detach", guest.name, "xvda"), f"xl block-detach {guest.domid} xvda")
    assert "xvda" in cli(shared, "block-list", guest.name).stdout


def test_nobody_serves(bed: Any) -> None:
    with ExitStack() as stack:
        alone = bed()
        guest = Guest(alone, stack, "web")
        done = cli(alone, "block-attach", "--timeout", "1", "web", "memory:1M,,xvdb")
        fails(done, "no backend has taken it within 1 s: is `pvdrivers serve` running in domain 0", "class pvblk")
        assert alone.dom0.store.ls(f"/local/domain/{guest.domid}/device/vbd/51728") is None


def test_without_any_xen(tmp_path: Path) -> None:
    class Nowhere:
        run_dir = tmp_path

    fails(cli(Nowhere(), "block-list", "5"), "no embedded Xen", "pvdrivers demo")  # type: ignore[arg-type]
