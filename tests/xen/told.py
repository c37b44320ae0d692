"""A plugin of pytest: names of tests that failed, for `bed run --again`; and which of them are not to be tried again.

A guest with wrong bytes or a failed request, or a daemon that died, is a failure whatever the next try says.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

FINAL = re.compile(r"I/O error|differ|verify|wrong data|checksum|sha256|our own fault|Traceback|alive\(\)", re.I)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Each failure at once: the machine may not live to the end."""
    if report.failed:
        said = "\n".join(line for line in report.longreprtext.splitlines() if line.startswith("E "))
        final = FINAL.search(said) is not None
        with (Path(os.environ.get("BED_RESULTS", "/tmp")) / "failed").open("a") as out:
            print("final" if final else "again", report.nodeid, file=out)
