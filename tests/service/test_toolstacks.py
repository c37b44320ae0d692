"""What real toolstacks do with a disk's directory: hotplug scripts, migration on one host, kinds of backend."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import hostile_frontend as hf
from tests.hostile_frontend import CLOSED, CONNECTED, INIT_WAIT, INITIALISED, READ, WRITE, Frontend, until
from tests.restart.bed import Bed


@pytest.fixture
def image(shared: Bed, request: pytest.FixtureRequest) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    path = shared.run_dir.parent / f"{name}.img"
    path.write_bytes(b"\x5a" * (1 << 20))
    return path


def front(bed: Bed, stack: ExitStack, params: str, **how: Any) -> Frontend:
    found = Frontend(bed.run_dir, bed.dom0, params, memory_mib=4, **how)
    stack.callback(found.destroy)
    return found


def reads(guest: Frontend) -> None:
    ring = guest.rings[0]
    data, (gref,) = guest.page()
    assert guest.ask(ring, hf.request(READ, [(gref, 0, 7)])) == [0]
    assert (data[:4096] == 0x5A).all()


@pytest.mark.parametrize(("kind", "params"), [("pvblk", "{}"), ("vbd", "aio:{}")])
def test_kinds_of_backend(shared: Bed, image: Path, kind: str, params: str) -> None:
    with ExitStack() as stack:
        guest = front(shared, stack, params.format(image), kind=kind)
        guest.connect()
        assert guest.back == f"/local/domain/0/backend/{kind}/{guest.domid}/51712"
        reads(guest)


def test_a_kind_that_was_not_asked_for(shared: Bed, image: Path) -> None:
    with ExitStack() as stack:
        guest = front(shared, stack, f"aio:{image}", kind="qdisk")
        time.sleep(0.3)
        assert guest.backend() == 1, "QEMU's, unless it is named"


@pytest.mark.parametrize("script", ["/etc/xen/scripts/block", "block", "/bin/true"])
def test_scripts_that_make_nothing_but_what_we_open(shared: Bed, image: Path, script: str) -> None:
    with ExitStack() as stack:
        guest = front(shared, stack, str(image), be={"script": script, "physical-device-path": "/dev/not-there"})
        guest.connect()
        reads(guest)


def test_a_script_that_runs_after_initwait(shared: Bed, image: Path) -> None:
    """libxl runs it only then; the guest may be faster."""
    with ExitStack() as stack:
        guest = front(shared, stack, "iqn.2026-01:disk", be={"script": "/etc/xen/scripts/block-iscsi"})
        guest.wait(INIT_WAIT)
        guest.say(INITIALISED, **guest.keys_of([guest.new_ring()]))
        said = f"vbd-{guest.domid}-51712: it waits for the hotplug script block-iscsi"
        until(lambda: said in shared.log.read_text())
        time.sleep(0.3)
        assert guest.backend() == INIT_WAIT and guest.error() == ""
        assert shared.log.read_text().count(said) == 1
        shared.dom0.store.write(f"{guest.back}/physical-device-path", str(image))
        guest.wait(CONNECTED, timeout=5)
        reads(guest)


def test_the_block_script_is_waited_for_where_it_makes_a_loop_device(shared: Bed, image: Path) -> None:
    """Of a file; it fails, and xl takes the disk away, where the backend is Connected before it has looked."""
    with ExitStack() as stack:
        guest = front(shared, stack, str(image), be={"script": "/etc/xen/scripts/block"})
        guest.wait(INIT_WAIT)
        guest.say(INITIALISED, **guest.keys_of([guest.new_ring()]))
        time.sleep(0.3)
        assert guest.backend() == INIT_WAIT and guest.error() == ""
        shared.dom0.store.write(f"{guest.back}/physical-device-path", "/dev/not-there")
        guest.wait(CONNECTED, timeout=5)
        reads(guest)
        # It has nothing to do for what is no file to it.
        Path(f"{image}2").write_bytes(bytes(1 << 20))
        for params in (f"{image}2,policy=copy", "memory:1M"):
            other = front(shared, stack, params, be={"script": "block"})
            other.connect()
            assert other.backend() == CONNECTED


@pytest.mark.root
def test_a_script_that_writes_only_the_number(shared: Bed, image: Path) -> None:
    with ExitStack() as stack:
        be = {"script": "block-old", "physical-device": "zz:1"}
        guest = front(shared, stack, "x", be=be)
        until(lambda: guest.key("hotplug-status") == "error")
        assert "not MAJOR:MINOR" in (guest.key("hotplug-error") or "")
        shared.dom0.store.write(f"{guest.back}/physical-device", "3e7:3e7")
        until(lambda: "/dev/block/999:999" in (guest.key("hotplug-error") or ""))


# Migration on one host: the same guest twice


def test_the_target_of_a_migration_waits_for_its_source(shared: Bed, image: Path) -> None:
    with ExitStack() as stack:
        source = front(shared, stack, str(image))
        ring = source.connect()
        target = front(shared, stack, str(image), migrates_from=source.domid)
        target.wait(INIT_WAIT, timeout=10)
        assert target.error() == "" and target.key("hotplug-error") is None
        assert target.key("hotplug-status") == "connected"
        # The target runs before the source is destroyed.
        target.say(INITIALISED, **target.keys_of([target.new_ring()]))
        data, (gref,) = source.page()
        data[:4096] = 0x5A
        deadline = time.monotonic() + 2.5
        while time.monotonic() < deadline:
            assert source.ask(ring, hf.request(WRITE, [(gref, 0, 7)], sector=64)) == [0]
            assert target.backend() == INIT_WAIT and target.error() == ""
            time.sleep(0.05)
        source.destroy()
        began = time.monotonic()
        target.wait(CONNECTED, timeout=10)
        assert time.monotonic() - began < 5.0
        reads(target)
        name = f"vbd-{target.domid}-51712: it waits for domain {source.domid}"
        assert shared.log.read_text().count(name) == 1


def test_a_migration_that_fails(shared: Bed, image: Path) -> None:
    """The target goes again; the source never noticed."""
    with ExitStack() as stack:
        source = front(shared, stack, str(image))
        source.connect()
        target = front(shared, stack, str(image), migrates_from=source.domid)
        target.wait(INIT_WAIT, timeout=10)
        target.destroy()
        reads(source)


def test_another_guest_is_refused(shared: Bed, image: Path) -> None:
    with ExitStack() as stack:
        first = front(shared, stack, str(image))
        first.connect()
        second = front(shared, stack, str(image))
        until(lambda: second.key("hotplug-status") == "error")
        assert "in use" in (second.key("hotplug-error") or "") and second.backend() == 1
        # Nor has a guest two disks of one image, whatever it is called.
        third = shared.dom0.store
        from pvdrivers.sim import toolstack

        again = toolstack.attach_vbd(third, first.domid, "xvdb", str(image))
        until(lambda: third.read(f"{again}/hotplug-status") == b"error")
        first.close()


def test_a_target_whose_image_somebody_else_takes(shared: Bed, image: Path) -> None:
    """Between the source's end and the target's connection: an ordinary error, and served when it is free."""
    with ExitStack() as stack:
        source = front(shared, stack, str(image))
        source.connect()
        target = front(shared, stack, str(image), migrates_from=source.domid)
        target.wait(INIT_WAIT, timeout=10)
        source.destroy()
        import fcntl

        with image.open("r+b") as file:
            deadline = time.monotonic() + 10
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            target.say(INITIALISED, **target.keys_of([target.new_ring()]))
            until(lambda: "in use" in target.error(), timeout=30)
        target.wait(CONNECTED, timeout=30)
        reads(target)
        target.close()
        assert target.backend() == CLOSED
