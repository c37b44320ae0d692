"""A plugin of pytest for the bed: who runs what, until when, and what failed.

Machines beside each other share out the files of tests: who first makes a file's directory in /share/claims runs it.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

FINAL = re.compile(r"I/O error|differ|verify|wrong data|checksum|sha256|our own fault|Traceback|alive\(\)", re.I)
"""A guest with wrong bytes or a failed request, or a daemon that died: a failure, whatever the next try says."""
RESULTS = Path(os.environ.get("BED_RESULTS", "/tmp"))
CLAIMS = RESULTS.parent / "claims"
BEGIN = float(os.environ.get("PVDRIVERS_XEN_BEGIN") or "inf")
"""Seconds from the machine's boot in which a test may begin."""
_claimed: dict[str, bool] = {}


def _is_ours(file: str) -> bool:
    if file not in _claimed:
        CLAIMS.mkdir(exist_ok=True)
        try:
            (CLAIMS / file.replace("/", "+")).mkdir()
            _claimed[file] = True
        except FileExistsError:
            _claimed[file] = False
    return _claimed[file]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a quick test come first, and those last that leave the machine other than it was."""
    quick = {item.location[0] for item in items if item.get_closest_marker("xen_quick")}

    def place(item: pytest.Item) -> int:
        last = isinstance(item, pytest.Function) and getattr(item.module, "LAST", False)
        return 2 if last else int(item.location[0] not in quick)

    items.sort(key=place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Leave a test alone whose file another machine has."""
    if _is_ours(item.location[0]):
        return None
    # The directory's own fixtures, which the test before has left for this one, are in the way of another directory's.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_runtest_setup() -> None:
    """Begin nothing when it is too late for it."""
    if time.clock_gettime(time.CLOCK_BOOTTIME) > BEGIN:
        pytest.skip(f"not begun, for want of time: PVDRIVERS_XEN_BEGIN is {BEGIN:.0f} s from boot")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Each failure at once: the machine may not live to the end."""
    if report.failed:
        said = "\n".join(line for line in report.longreprtext.splitlines() if line.startswith("E "))
        final = FINAL.search(said) is not None
        with (RESULTS / "failed").open("a") as out:
            print("final" if final else "again", report.nodeid, file=out)
