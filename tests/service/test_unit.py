"""The unit of examples/dom0: systemd takes it, and what it forbids the daemon does not need."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pvdrivers import handover
from pvdrivers.cli import EXIT_FAILED, EXIT_UNAVAILABLE, EXIT_USAGE, main, where
from pvdrivers.errors import PlatformError, UnavailableError
from pvdrivers.frontends.load import Load
from pvdrivers.storage.software_pool import JOIN_SECONDS
from pvdrivers.storage.xl_disk import parse_xl_disk
from pvdrivers.xen import devices
from tests.restart.bed import Bed
from tests.restart.test_killed import LOAD, check_unnoticed, goes_on, image
from tests.service.conftest import cli

DOM0 = Path(__file__).resolve().parents[2] / "examples" / "dom0"
UNIT = (DOM0 / "pvdrivers.service").read_text()
Program = Callable[[str, str], str]


def settings(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """As they are installed, but with the program that is here."""
    program = shutil.which("pvdrivers", path=str(Path(sys.executable).parent))
    assert program is not None
    found = []
    for name, source in (
        ("pvdrivers.service", "pvdrivers.service"),
        ("pvdrivers@web.service", "pvdrivers.service"),
        ("pvdrivers-warm.service", "pvdrivers-warm.service"),
    ):
        path = tmp_path / name
        path.write_text((DOM0 / source).read_text().replace("/opt/pvdrivers/bin/pvdrivers", program))
        found.append(path)
    return found


def test_systemd_takes_the_units(units: list[Path], require_program: Program) -> None:
    systemd = require_program("systemd-analyze", "systemd")
    done = subprocess.run([systemd, "verify", "--man=no", *units], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_how_much_is_exposed(units: list[Path], require_program: Program) -> None:
    """systemd's own score: from 0, nothing, to 10."""
    systemd = require_program("systemd-analyze", "systemd")
    command = [systemd, "security", "--no-pager", "--offline=yes"]
    for unit, most in ((units[0], 2.0), (units[2], 1.8)):
        done = subprocess.run([*command, unit], capture_output=True, text=True, timeout=60)
        if "unrecognized option" in done.stderr:
            pytest.skip("this systemd-analyze looks at no files")
        found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
        assert found and float(found[1]) <= most, done.stdout + done.stderr


def allowed(systemd: str) -> set[str]:
    """The system calls that the unit's filters leave, by systemd's own tables."""

    def calls(words: str) -> set[str]:
        out: set[str] = set()
        for word in words.split():
            if not word.startswith("@"):
                out.add(word)
                continue
            text = subprocess.run([systemd, "syscall-filter", word], capture_output=True, text=True, check=True).stdout
            for line in text.splitlines()[1:]:
                if line.strip() and not line.strip().startswith("#"):
                    out |= calls(line.strip())
        return out

    found: set[str] = set()
    for words in settings("SystemCallFilter"):
        found = found - calls(words[1:]) if words.startswith("~") else found | calls(words)
    return found


def test_no_system_call_is_missed(bed: Callable[..., Bed], tmp_path: Path, require_program: Program) -> None:
    """All that a daemon and its successor call, from start to end, under load, is let through."""
    systemd, strace = require_program("systemd-analyze", "systemd"), require_program("strace", "strace")
    trace = tmp_path / "trace"
    b = bed()
    b.before = (strace, "-D", "-f", "-qq", "-o", str(trace), "--signal=none")
    b.serve()
    disks = [b.disk(image(tmp_path), queues=2, ring_order=1), b.disk("memory:1M")]
    for disk in disks:
        disk.write(0, b"x" * 4096)
        disk.flush()
        disk.discard(0, 4096)
    b.dom0.store.write("/local/domain/0/backend/vbd/2/51712/mode", "w")
    assert cli(b, "upgrade", timeout=300).returncode == 0
    disks[0].write(0, b"x" * 4096)
    assert b.backend is not None
    names = set(re.findall(r"^\d+ +([a-z0-9_]+)\(", trace.read_text(errors="replace"), re.MULTILINE))
    assert {"io_uring_setup", "io_uring_enter", "sendmsg", "flock", "mmap", "fallocate"} <= names
    assert names - allowed(systemd) == set()


@pytest.mark.root
def test_no_capability_is_missed(bed: Callable[..., Bed], tmp_path: Path, require_program: Program) -> None:
    """With the capabilities and the limits of the unit, and no new ones: load, upgrade, load."""
    setpriv = require_program("setpriv", "util-linux")
    (bounding,) = settings("CapabilityBoundingSet")
    keep = [f"+{word.removeprefix('CAP_').lower()}" for word in bounding.split()]
    b = bed()
    b.before = (setpriv, "--bounding-set", ",".join(["-all", *keep]), "--inh-caps=-all", "--no-new-privs")
    first = b.serve()
    status = Path(f"/proc/{first.popen.pid}/status").read_text()
    assert "CapEff:\t0000000000000002\n" in status and "NoNewPrivs:\t1" in status
    disk = b.disk(image(tmp_path), queues=2, ring_order=1)
    before = b.frontend()
    load = Load(disk, LOAD)
    load.start()
    goes_on(load)
    assert cli(b, "upgrade", timeout=300).returncode == 0
    goes_on(load)
    check_unnoticed(b, load, before)


def test_it_says_what_it_does() -> None:
    assert settings("Type") == ["notify"] and settings("NotifyAccess") == ["all"]
    assert settings("RuntimeDirectoryPreserve") == ["yes"] and settings("Restart") == ["always"]
    assert "privcmd" not in " ".join(settings("DeviceAllow"))
    assert "-/proc/xen/privcmd" in settings("InaccessiblePaths")[0].split()
    assert settings("RestartPreventExitStatus") == [f"{EXIT_USAGE} {EXIT_UNAVAILABLE}"]
    assert not settings("MemoryDenyWriteExecute") and "# MemoryDenyWriteExecute=" in UNIT


@pytest.mark.parametrize("lacking", ["gntdev", "evtchn"])
def test_it_is_not_restarted_where_a_device_is_missing(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten starts a second would not make it appear; and other commands fail as ever."""
    for name in {"gntdev", "evtchn"} - {lacking}:
        (tmp_path / name).touch()
    monkeypatch.setattr(where, "GNTDEV", str(tmp_path / "gntdev"))
    monkeypatch.setattr(devices, "EVTCHN", str(tmp_path / "evtchn"))
    status = main(["serve", "--run-dir", str(tmp_path / "run")])
    assert str(status) in settings("RestartPreventExitStatus")[0].split() and status == EXIT_UNAVAILABLE
    assert f"{tmp_path / lacking}" in capsys.readouterr().err
    if lacking == "gntdev":
        assert main(["block-list", "--run-dir", str(tmp_path / "run"), "web"]) == EXIT_FAILED


def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    """Any error but those for which there is something that the operator has to do."""
    path = tmp_path / "gntdev"
    path.symlink_to(path)
    with pytest.raises(PlatformError, match="see the kernel's log") as error:
        devices.open_device(str(path))
    assert not isinstance(error.value, UnavailableError)


def test_the_guest_that_is_to_be_pasted() -> None:
    """A configuration of xl is Python enough to be read as such; its disks are what xl's manual says."""
    config: dict[str, object] = {}
    text = (DOM0 / "guest.cfg").read_text()
    exec(compile(text, "guest.cfg", "exec"), {}, config)
    disks = config["disk"]
    assert isinstance(disks, list)
    examples = re.findall(r"^#   '(.*)'$", text, re.MULTILINE)
    assert len(examples) == 2
    for words in [*disks, *examples]:
        disk = parse_xl_disk([words.replace("script=/bin/true, ", "")])
        assert disk.vdev.startswith("xvd")
    assert config["name"] and config["type"] == "pv"


def test_a_stop_is_given_the_time_that_it_takes() -> None:
    assert int(*settings("TimeoutStopSec")) > handover.SECONDS + JOIN_SECONDS
