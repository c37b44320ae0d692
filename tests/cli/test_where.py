"""Which Xen a command is about."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pvdrivers.cli import where
from tests.xenstore.conftest import Served


@pytest.fixture
def gntdev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As on a host with Xen, as soon as it is there."""
    path = tmp_path / "gntdev"
    monkeypatch.setattr(where, "GNTDEV", str(path))
    return path


def leave_socket(run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.bind(str(run_dir / "xenstored"))


def test_what_a_killed_embedded_xen_left_on_a_xen_host_is_none(tmp_path: Path, gntdev: Path) -> None:
    leave_socket(tmp_path)
    gntdev.touch()
    assert not where.embedded(tmp_path)


def test_one_that_runs_is_meant_even_on_a_xen_host(tmp_path: Path, gntdev: Path) -> None:
    gntdev.touch()
    served = Served(tmp_path / "xenstored")
    try:
        assert where.embedded(tmp_path)
    finally:
        served.close()


def test_what_a_killed_one_left_elsewhere_is_said_to_be_dead(tmp_path: Path, gntdev: Path) -> None:
    leave_socket(tmp_path)
    with pytest.raises(where.PlatformError, match="refused"):
        where.open_store(tmp_path)
