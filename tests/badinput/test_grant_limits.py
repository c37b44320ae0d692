"""Xen has no room for more mapped grants: the disk is copied from then on, and the operator hears why, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pvdrivers.cli.stats import snapshot
from pvdrivers.frontends.load import Ledger, Load, Plan
from tests.restart.bed import Bed

SIZE = 2 << 20


def counters(bed: Bed, domid: int) -> dict[str, int]:
    """The sums over the queues of a guest's disk."""
    found = next(d for d in snapshot(bed.run_dir) if d["domid"] == domid)
    names = ("fallbacks", "map_failures", "errors", "grants_copied", "persistent_held")
    return {name: sum(q[name] for q in found["queues"]) for name in names}


@pytest.mark.parametrize(("policy", "room"), [("persistent", 40), ("map", 20), ("map", 1)])
def test_maptrack_is_used_up(policy: str, room: int, tmp_path: Path) -> None:
    with Bed(tmp_path / "run", "--strict") as bed:
        bed.serve(PVDRIVERS_TEST_MAPTRACK=str(room))
        images = [tmp_path / f"{name}.img" for name in "ab"]
        for image in images:
            image.write_bytes(bytes(SIZE))
        # The first guest's disk is let alone, so that what Xen gives is the second's.
        idle, disk = (bed.disk(f"{image},policy={policy}", queues=2, indirect=32) for image in images)
        ledger = Ledger(SIZE, 65536)
        for percent in (100, 50, 0):
            load = Load(disk, Plan(block_size=65536, length=SIZE, depth=32, verify="all", write_percent=percent,
                                   requests=300), ledger)  # fmt: skip
            assert load.run(60).right, str(load)
        found = counters(bed, 2)
        assert found["fallbacks"] > 0 and found["grants_copied"] > 3000
        assert (found["errors"], found["map_failures"], found["persistent_held"]) == (0, 0, 0)
        assert counters(bed, 1)["fallbacks"] == 0
        idle.write(4096, b"i" * 4096)
        assert idle.read(4096, 4096) == b"i" * 4096
        log = bed.log.read_text()
        assert log.count("vbd-2-51712: Xen has no room for more mapped grants (maptrack, GNTST -13)") == 1
        assert "gnttab_max_maptrack_frames" in log and "policy=copy" in log
        for front in (disk, idle):
            front.close()
            assert front.stats()["stuck_grants"] == 0
        with images[1].open("rb") as file:
            assert ledger.check(0, file.read(SIZE))


def test_what_does_not_fit_into_the_budget(tmp_path: Path) -> None:
    """The first disk has all it wants, the next less, the last is copied; what one gives back another has."""
    with Bed(tmp_path / "run") as bed:
        bed.words = ("--grant-pages", "3000", "--grant-pages-per-domain", "2500")
        bed.serve()
        disks = [bed.disk("memory:1M,indirect=0", queues=1, ring_order=0, memory_mib=16) for _ in range(4)]
        about = [next(d for d in snapshot(bed.run_dir) if d["domid"] == domid) for domid in (1, 2, 3, 4)]
        assert [d["grant_pages"] for d in about] == [1 + 1056 + 352, 1 + 1056 + 352, 1 + (1056 + 352) // 8, 1]
        assert [d["policy"] for d in about] == ["persistent"] * 3 + ["copy"]
        for k, disk in enumerate(disks):
            disk.write(0, bytes([k]) * (1 << 20))
            assert disk.read(0, 1 << 20) == bytes([k]) * (1 << 20)
        assert not [name for d in snapshot(bed.run_dir) for q in d["queues"] for name in ("errors",) if q[name]]
        log = bed.log.read_text()
        assert log.count("pages of its guest mapped") == 2
        assert "vbd-3-51712: it would have 1409 pages of its guest mapped, but 182 pages are left of 3000 that " in log
        assert "this process may have; raise --grant-pages; each ring keeps 132 pages and maps 44 more" in log
        assert "vbd-4-51712: " in log and "its requests are copied" in log
        disks[0].close()
        late = bed.disk("memory:1M,indirect=0,grant_pages=400", queues=1, ring_order=0, memory_mib=16)
        late.write(0, b"late" * 1024)
        log = bed.log.read_text()
        assert "but 400 pages are left of 400 that the disk may have; raise its option grant_pages" in log
