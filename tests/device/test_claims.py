"""One process a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pvdrivers.claims import Claims
from pvdrivers.device import DeviceId
from pvdrivers.errors import DeviceBusyError

DEVICE = DeviceId(0, "vbd", 5, 51712, "/local/domain/5/device/vbd/51712")
OTHER = DeviceId(0, "vbd", 6, 51712, "/local/domain/6/device/vbd/51712")
HOLD = """
import sys
from pathlib import Path
from pvdrivers.claims import Claims
from pvdrivers.device import DeviceId
Claims(Path(sys.argv[1])).take(DeviceId(0, "vbd", 5, 51712, "/local/domain/5/device/vbd/51712"))
print("taken", flush=True)
sys.stdin.read()
"""


def test_another_process_is_named(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "taken\n"
        claims = Claims(tmp_path)
        with pytest.raises(DeviceBusyError) as caught:
            claims.take(DEVICE)
        assert f"pid {holder.pid}" in str(caught.value) and "vbd-5-51712" in str(caught.value)
        assert str(tmp_path / "claims" / "0-vbd-5-51712.lock") in str(caught.value)
        claims.take(OTHER)
        holder.kill()
        holder.wait()
        claims.take(DEVICE)  # a claim ends with its process, however that ended
        claims.close()


def test_twice_in_one_process(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    first.take(DEVICE)
    with pytest.raises(DeviceBusyError, match="this process already"):
        first.take(DEVICE)
    with pytest.raises(DeviceBusyError, match=f"pid {os.getpid()}"):
        second.take(DEVICE)
    first.drop(DEVICE)
    first.drop(DEVICE)
    second.take(DEVICE)
    first.close()
    second.close()


def test_a_claim_is_not_inherited(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    claims.take(DEVICE)
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        claims.close()
        other = Claims(tmp_path)
        other.take(DEVICE)
        other.close()
        child.kill()


def test_the_run_directory_is_ours(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "new")
    claims.take(DEVICE)
    assert (tmp_path / "new" / "claims").stat().st_mode & 0o777 == 0o700
    assert claims.path(DEVICE).read_text() == f"{os.getpid()}\n"
    claims.close()
