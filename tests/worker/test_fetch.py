"""What is read once out of pages of the guest: by copies, or out of pages that the ring keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pvdrivers.platform import GRANT_OP
from pvdrivers.worker.fetch import fetch
from pvdrivers.worker.records import POLICY_COPY, POLICY_MAP, POLICY_PERSISTENT
from tests.rings.guard import Guarded
from tests.worker.bed import BAD_GNTREF, DOMID, PAGE, Bed


def read(bed: Bed, *wanted: tuple[int, int]) -> list[int]:
    """Fetch (gref, bytes) each; the statuses. What was read is what stands there, and not a byte more."""
    memory = Guarded(len(wanted) * PAGE)
    memory.bytes[:] = 0xEE
    ops = bed.batch.view(GRANT_OP)
    for k, (gref, length) in enumerate(wanted):
        op: Any = ops[k]
        op["gref"], op["domid"], op["flags"], op["status"] = gref, DOMID, 0, 77
        op["address"], op["offset"], op["length"] = memory.address + k * PAGE, 0, length
    fetch(bed.wa, bed.ra, len(wanted))
    statuses = ops["status"][: len(wanted)].tolist()
    for (gref, length), status, page in zip(wanted, statuses, memory.bytes.reshape(-1, PAGE)):
        got = 0 if status else length
        assert (page[:got] == bed.pages[min(gref, len(bed.pages) - 1), :got]).all() and (page[got:] == 0xEE).all()
    bed.check()
    return statuses


@pytest.mark.parametrize("policy", [POLICY_MAP, POLICY_COPY])
def test_by_one_copy(policy: int) -> None:
    bed = Bed(policy)
    bed.refused[2] = BAD_GNTREF
    assert read(bed, (1, 8), (2, 4096), (3, 4096), (99, 64)) == [0, BAD_GNTREF, 0, BAD_GNTREF]
    assert bed.calls() == {"map": 0, "unmap": 0, "copy": 1}
    assert bed.stats[0]["grants_copied"] == 4 and not bed.mapped.any()


def test_pages_are_kept() -> None:
    bed = Bed(POLICY_PERSISTENT)
    assert read(bed, (1, 8), (3, 4096)) == [0, 0]
    assert bed.calls() == {"map": 1, "unmap": 0, "copy": 0} and bed.cached() == {3: 0, 1: 0}
    bed.pages[1] = 99
    assert read(bed, (3, 256), (1, 4096), (3, 8)) == [0, 0, 0]
    assert bed.calls() == {"map": 1, "unmap": 0, "copy": 0}
    assert bed.stats[0]["persistent_hits"] == 3 and not bed.readonly.any()
    assert read(bed, (1, 8), (4, 8)) == [0, 0]
    assert bed.calls() == {"map": 2, "unmap": 0, "copy": 0} and bed.cached() == {4: 0, 1: 0, 3: 0}


def test_a_page_named_twice_is_kept_once() -> None:
    bed = Bed(POLICY_PERSISTENT)
    assert read(bed, (1, 8), (1, 16), (2, 8)) == [0, 0, 0]
    assert bed.mapped[1] == 1 and bed.cached() == {2: 0, 1: 0}
    assert bed.calls() == {"map": 1, "unmap": 1, "copy": 0}


def test_a_full_cache() -> None:
    """The oldest goes; where all are in use, a page is mapped for the moment."""
    bed = Bed(POLICY_PERSISTENT, bound=2)
    for gref in (1, 2):
        assert read(bed, (gref, 8)) == [0]
    assert read(bed, (3, 8)) == [0]
    assert bed.cached() == {3: 0, 2: 0} and bed.mapped.sum() == 2
    bed.prepare(0, [(2, 0, PAGE), (3, 0, PAGE)], to_guest=True)
    bed.acquire([0])
    assert read(bed, (4, 8), (2, 8), (5, 8)) == [0, 0, 0]
    assert bed.cached() == {3: 1, 2: 1} and bed.mapped.sum() == 2
    bed.release(0)


@pytest.mark.parametrize("lacking", ["grant", "room"])
def test_what_cannot_be_mapped_is_copied(lacking: str) -> None:
    """A page that is read only, say; then it is not tried again."""
    bed = Bed(POLICY_PERSISTENT)
    assert read(bed, (1, 8)) == [0]
    if lacking == "room":
        bed.counts[0]["room"] = 1
    else:
        bed.refused[4] = BAD_GNTREF
    assert read(bed, (1, 8), (4, 8), (2, 8)) == [0, 0 if lacking == "room" else BAD_GNTREF, 0]
    calls = bed.calls()
    assert calls["map"] == 2 and calls["copy"] == 1
    assert read(bed, (5, 8), (6, 8)) == [0, 0]
    assert bed.calls() == {**calls, "copy": 2}
    assert bed.ring[0]["policy"] == POLICY_PERSISTENT and np.flatnonzero(bed.mapped).tolist() == sorted(bed.cached())
