"""What every test may use: Hypothesis profiles, and skips that say what is lacking.

On a laptop a test that needs a program it cannot find is skipped, with the name of the package; where CI is
set it fails, since there a missing program means that something went unverified without anybody noticing.
"""

from __future__ import annotations

import glob
import os
import shutil
import signal
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

# A deadline would make a test of the machine's load; the first example of a kernel also compiles it.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=2000,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# A shell's background job ignores SIGINT, and so would all that it starts; what has a handler here has none there.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_AT_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
_JIT_OFF = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
_BOUNDSCHECK = os.environ.get("NUMBA_BOUNDSCHECK", "0") not in ("", "0")
_FUZZ_UNTIL = float(os.environ.get("PVDRIVERS_FUZZ_UNTIL", "inf"))


def lacking(what: str) -> None:
    """End this test: `what` is not here. A skip, or at CI a failure."""
    if _AT_CI:
        pytest.fail(f"{what} (a skip elsewhere, a failure at CI)", pytrace=False)
    pytest.skip(what)


def find_program(name: str, package: str) -> str:
    """The path of a program, which may be given as a pattern of absolute paths; ends the test without it."""
    found = next(iter(sorted(glob.glob(name), reverse=True)), None) if "/" in name else shutil.which(name)
    if found is None:
        lacking(f"{name} is not installed: apt-get install {package}")
    assert found is not None
    return found


@pytest.fixture(scope="session")
def require_program() -> Callable[[str, str], str]:
    """``require_program("fio", "fio")``: its path, or the end of the test with the package to install."""
    return find_program


@pytest.fixture(scope="session")
def require_package() -> Callable[[str, str], str]:
    """The same for a file that is no program: ``require_package("/usr/include/xen/xen.h", "libxen-dev")``."""
    return find_program


@pytest.fixture
def require_root() -> None:
    """Ends the test for anybody but root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Turn the markers that depend on how the suite runs into skips with their reasons."""
    for item in items:
        if os.geteuid() != 0 and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))
        _leave_out(item, "jit_only", _JIT_OFF, "with the JIT off")
        _leave_out(item, "no_boundscheck", _BOUNDSCHECK, "with bounds checks")


def _leave_out(item: pytest.Item, name: str, applies: bool, when: str) -> None:
    marker = item.get_closest_marker(name)
    if marker is None:
        return
    reason = marker.args[0] if marker.args else marker.kwargs.get("reason")
    if not reason:
        raise pytest.UsageError(f"{item.nodeid}: {name} wants a reason")
    if applies:
        item.add_marker(pytest.mark.skip(reason=f"left out {when}: {reason}"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let a round of fuzzing end near the time asked for."""
    if time.time() > _FUZZ_UNTIL:
        pytest.skip("the time for fuzzing is over")
