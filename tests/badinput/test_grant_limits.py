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
