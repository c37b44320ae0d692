"""``pvdrivers upgrade`` under verified reads and writes: a new process takes over, and the guest notices nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pvdrivers import __version__, daemons
from pvdrivers.frontends.load import Load
from rings.cache import DIGEST, cache_dir
from tests.restart.bed import Bed, until
from tests.restart.test_killed import LOAD, check_unnoticed, goes_on, image
from tests.service.conftest import cli
from tests.service.manager import Manager

PAUSE = re.compile(r"(\S+): paused for ([0-9.]+) ms")


def pids(bed: Bed) -> list[int]:
    return [daemon.pid for daemon in daemons.running(bed.run_dir)]


@pytest.mark.parametrize("times", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_under_load(bed: Callable[..., Bed], tmp_path: Path, times: int) -> None:
    b = bed("--workers", "2")
    first = b.serve()
    disks = [b.disk(image(tmp_path), queues=2, ring_order=1), b.disk("memory:16M", queues=1, ring_order=0)]
    before = [b.frontend(domid) for domid in (1, 2)]
    loads = [Load(disk, LOAD) for disk in disks]
    for load in loads:
        load.start()
        goes_on(load)
    old = pids(b)
    where = b.run_dir / "daemons"
    assert old == [first.popen.pid], (sorted(where.iterdir()), first.popen.poll(), b.log.read_text())
    for _ in range(times):
        done = cli(b, "upgrade", timeout=200)
        assert (done.returncode, done.stderr) == (0, ""), (done, b.log.read_text())
        new = pids(b)
        assert len(new) == 1 and new != old
        lines = done.stdout.splitlines()
        pauses = {m[1]: float(m[2]) for line in lines[:-1] if (m := PAUSE.fullmatch(line))}
        assert set(pauses) == {"vbd-1-51712", "vbd-2-51712"} and min(pauses.values()) > 0, lines
        said = f"daemon {old[0]} (version {__version__}) -> {new[0]} (version {__version__}): 2 connected devices"
        assert lines[-1] == f"{said}, paused for at most {max(pauses.values()):.1f} ms"
        assert max(pauses.values()) < 5000, "a pause, not an outage"
        for load in loads:
            goes_on(load)
        old = new
    assert first.popen.wait(10) == 0
    until(lambda: cli(b, "stats").stdout.count("Connected") == 2)
    for load, disk, domid in zip(loads, disks, (1, 2)):
        b.disks = [disk]
        check_unnoticed(b, load, before[domid - 1]) if domid == 1 else load.stop()
    assert loads[1].wait(30).right and b.frontend(2) == before[1]
    b.disks = disks
    # The last one is an ordinary daemon: it ends when it is told to, and what is left is a run directory without any.
    os.kill(old[0], signal.SIGTERM)
    until(lambda: list((b.run_dir / "daemons").iterdir()) == [])


def test_a_successor_that_fails(bed: Callable[..., Bed], tmp_path: Path) -> None:
    """It cannot start, or not in time: the old one serves on, and says why."""
    b = bed()
    compiled = tmp_path / "cache" / DIGEST
    shutil.copytree(cache_dir(), compiled, ignore=shutil.ignore_patterns("image"))
    first = b.serve(PVDRIVERS_CACHE_DIR=str(compiled.parent), PVDRIVERS_IMAGE="off")
    disk = b.disk(image(tmp_path), queues=1, ring_order=1)
    load = Load(disk, LOAD)
    load.start()
    goes_on(load)
    before = b.frontend()
    compiled.rename(tmp_path / "compiled")  # so that the successor has everything to compile
    done = cli(b, "upgrade", "--timeout", "1")
    shutil.rmtree(compiled, ignore_errors=True)  # if it came that far
    (tmp_path / "compiled").rename(compiled)
    assert done.returncode == 1
    assert "it was not ready within 1 s; compile beforehand (pvdrivers warm)" in done.stdout, done
    assert done.stdout.rstrip().endswith("it serves on")
    assert done.stderr == "pvdrivers: error: 1 of 1 daemon could not be upgraded in order\n"
    assert pids(b) == [first.popen.pid]
    goes_on(load)

    # One that refuses to run here: its reason is shown.
    store = b.run_dir / "xenstored"
    store.rename(b.run_dir / "elsewhere")
    done = cli(b, "upgrade")
    (b.run_dir / "elsewhere").rename(store)
    assert done.returncode == 1 and "no embedded Xen" in done.stdout and "it serves on" in done.stdout, done
    assert first.popen.poll() is None and pids(b) == [first.popen.pid]
    assert b.log.read_text().count("does not take over") == 2
    goes_on(load)
    done = cli(b, "upgrade", timeout=200)
    assert done.returncode == 0, "and it can be tried again"
    goes_on(load)
    check_unnoticed(b, load, before)


def test_a_successor_that_is_killed_while_it_gets_ready(bed: Callable[..., Bed]) -> None:
    b = bed()
    first = b.serve()
    with daemons.connect(b.run_dir / "daemons" / f"{first.popen.pid}.sock") as sock:
        from pvdrivers.link import receive, send

        sock.settimeout(30)
        send(sock, do="upgrade", timeout=100)
        started = receive(sock)
        assert started is not None and started["event"] == "started"
        with daemons.connect(b.run_dir / "daemons" / f"{first.popen.pid}.sock") as second:
            second.settimeout(30)
            send(second, do="upgrade", timeout=100)
            refused = receive(second)
            assert refused is not None and "under way already" in refused["why"]
        os.kill(started["pid"], signal.SIGKILL)
        failed = receive(sock)
        assert failed is not None and failed["event"] == "failed" and "status -9" in failed["why"]
        assert receive(sock) is None
    assert pids(b) == [first.popen.pid]
    b.disk("memory:1M").write(0, b"x" * 512)


def test_nonsense_on_the_socket(bed: Callable[..., Bed]) -> None:
    b = bed()
    first = b.serve()
    for words in (b"", b"{}", b"[]", b"\xff", b'{"do": "upgrade", "timeout": "x"}', b"9" * 5000):
        with daemons.connect(b.run_dir / "daemons" / f"{first.popen.pid}.sock") as sock:
            sock.settimeout(10)
            if words:
                sock.send(words)
            else:
                sock.shutdown(1)
            assert sock.recv(100) == b""
    b.disk("memory:1M").write(0, b"x" * 512)
    assert "our own fault" not in b.log.read_text()


class Newer:
    """The next daemon that starts runs other code than those before: what a new version would be."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.environment = {"PYTHONPATH": str(where)}

    def is_(self, source: str) -> None:
        """From now on a successor runs these lines first; `upgrade` is the module."""
        lines = ["import os", "if 'PVDRIVERS_SUCCESSOR_LINK' in os.environ:", "    from pvdrivers import upgrade"]
        lines += ["    " + line for line in source.splitlines()]
        (self.where / "sitecustomize.py").write_text("\n".join(lines) + "\n")

    def is_the_same(self) -> None:
        (self.where / "sitecustomize.py").unlink()


@pytest.fixture
def newer(tmp_path: Path) -> Newer:
    (tmp_path / "newer").mkdir()
    return Newer(tmp_path / "newer")


def loaded(b: Bed, tmp_path: Path) -> tuple[Load, dict[str, bytes]]:
    """A guest under verified load, and another that is idle."""
    disk = b.disk(image(tmp_path), queues=2, ring_order=1)
    b.disk("memory:1M").write(0, b"x" * 512)
    load = Load(disk, LOAD)
    load.start()
    goes_on(load)
    return load, b.frontend()


def idle_disk_is_well(b: Bed) -> None:
    assert bytes(b.disks[1].read(0, 512)) == b"x" * 512


def test_a_version_with_other_journals(bed: Callable[..., Bed], tmp_path: Path, newer: Newer) -> None:
    """It is refused while nothing has been let go of. By force disks are closed, and guests that can connect anew."""
    b = bed()
    first = b.serve(**newer.environment)
    load, before = loaded(b, tmp_path)
    newer.is_("from pvdrivers import journal\njournal.VERSION += 1\nupgrade.__version__ = '9.9'")
    done = cli(b, "upgrade", timeout=200)
    assert done.returncode == 1 and "version 9.9 reads other journals (PVJRNL-1.2/" in done.stdout, done
    assert f"than those of version {__version__} (PVJRNL-1.1/" in done.stdout
    assert done.stdout.rstrip().endswith("or do it with --force; it serves on")
    assert pids(b) == [first.popen.pid]
    goes_on(load)
    assert b.frontend() == before and load.snapshot().requeues == 0, "nothing was let go of"
    done = cli(b, "upgrade", "--force", timeout=200)
    assert done.returncode == 0 and "(version 9.9): 2 connected devices" in done.stdout, (done, b.log.read_text())
    assert first.popen.wait(10) == 0
    assert b.log.read_text().count("cannot be taken over, and reconnects") == 2
    goes_on(load)
    assert b.frontend() != before, "it has connected anew"
    load.stop()
    assert load.wait(60).right
    idle_disk_is_well(b)


def test_without_a_journal_it_is_refused(bed: Callable[..., Bed]) -> None:
    b = bed("--no-journal")
    first = b.serve()
    done = cli(b, "upgrade")
    assert done.returncode == 1 and "it keeps no journal (--no-journal), so every disk would be closed" in done.stdout
    assert pids(b) == [first.popen.pid]


def taken_back(b: Bed, tmp_path: Path, newer: Newer, source: str, why: str) -> None:
    first = b.backend
    assert first is not None
    load, before = loaded(b, tmp_path)
    newer.is_(source)
    done = cli(b, "upgrade", timeout=200)
    assert done.returncode == 1 and why in done.stdout, (done, b.log.read_text())
    assert done.stdout.rstrip().endswith("; it serves on")
    assert pids(b) == [first.popen.pid] and first.popen.poll() is None
    until(lambda: cli(b, "stats").stdout.count("  Connected") == 2)
    goes_on(load)
    idle_disk_is_well(b)
    newer.is_the_same()
    done = cli(b, "upgrade", timeout=200)
    assert done.returncode == 0 and pids(b) != [first.popen.pid], "and it can be tried again"
    goes_on(load)
    idle_disk_is_well(b)
    b.disks.reverse()
    b.disks.pop(0).close()
    check_unnoticed(b, load, before)


def test_a_successor_that_dies_while_it_takes_over(bed: Callable[..., Bed], tmp_path: Path, newer: Newer) -> None:
    """It has a device already: the old one has all of them again. The manager hears of who follows in the end."""
    with Manager(str(tmp_path / "notify")) as manager:
        b = bed()
        first = b.serve(NOTIFY_SOCKET=manager.address, **newer.environment)
        dies = "upgrade.New._changed = lambda self, life: os.kill(os.getpid(), 9) if life and life.connected else None"
        taken_back(b, tmp_path, newer, dies, "it ended with status -9")
        (last,) = pids(b)
        manager.until(lambda m: m.get("MAINPID") == str(last))
        told = [m["MAINPID"] for _, m in manager.messages if "MAINPID" in m]
        assert set(told) == {str(first.popen.pid), str(last)}, "never of the one that died"
        assert not manager.heard("STOPPING")


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3, 5, 6, 7])
def test_a_successor_whose_worker_dies(bed: Callable[..., Bed], tmp_path: Path, newer: Newer, step: int) -> None:
    """At a step of the journal, in the very first requests."""
    b = bed()
    b.serve(**newer.environment)
    dies = f"os.environ['PVDRIVERS_TEST_KILL'] = '{step}:1'\n"
    dies += "upgrade.New._changed = lambda self, life: None"  # or it might have settled, and the old one be gone
    taken_back(b, tmp_path, newer, dies, "it ended with status -9")


@pytest.mark.slow
def test_a_successor_that_hangs(bed: Callable[..., Bed], tmp_path: Path, newer: Newer) -> None:
    """It is told to go on and does not: it is killed, and the old one goes on."""
    b = bed()
    (newer.where / "sitecustomize.py").write_text("from pvdrivers import upgrade\nupgrade._TAKE_SECONDS = 3.0\n")
    b.serve(**newer.environment)
    hangs = "import signal\nupgrade.New._take = lambda self, key, at: os.kill(os.getpid(), signal.SIGSTOP)"
    taken_back(b, tmp_path, newer, hangs, "it had not taken a single device after 3 s")


@pytest.mark.slow
def test_the_old_one_dies_in_the_middle(bed: Callable[..., Bed], tmp_path: Path, newer: Newer) -> None:
    """After the first device was let go of: the new one has that, and what is left."""
    b = bed()
    (newer.where / "sitecustomize.py").write_text(
        "import os\nfrom pvdrivers import upgrade\nreleased = upgrade.Old._released\n"
        "upgrade.Old._released = lambda self, *what: (released(self, *what), os.kill(os.getpid(), 9))\n"
    )
    first = b.serve(**newer.environment)
    load, before = loaded(b, tmp_path)
    newer.is_the_same()
    done = cli(b, "upgrade", timeout=200)
    assert done.returncode == 0, (done, b.log.read_text())
    assert first.popen.wait(10) == -signal.SIGKILL
    goes_on(load)
    idle_disk_is_well(b)
    b.disks.reverse()
    b.disks.pop(0).close()
    check_unnoticed(b, load, before)


@pytest.mark.slow
def test_the_daemon_ends_while_its_successor_gets_ready(bed: Callable[..., Bed]) -> None:
    """The service is being stopped: nobody takes over."""
    b = bed()
    first = b.serve()
    with daemons.connect(b.run_dir / "daemons" / f"{first.popen.pid}.sock") as sock:
        from pvdrivers.link import receive, send

        sock.settimeout(60)
        send(sock, do="upgrade", timeout=100)
        started = receive(sock)
        assert started is not None
        first.popen.send_signal(signal.SIGTERM)
        assert first.popen.wait(20) == 0
    until(lambda: not Path(f"/proc/{started['pid']}/fd").exists() or not os.listdir(f"/proc/{started['pid']}/fd"))
    assert pids(b) == []


@pytest.mark.slow
def test_several_daemons(bed: Callable[..., Bed], tmp_path: Path) -> None:
    """Each that runs on the directory, or the one that is named."""
    b = bed("--domain", "1")
    first = b.serve()
    b.words = ("--domain", "2")
    second = b.serve()
    disks = [b.disk(image(tmp_path)), b.disk("memory:1M")]
    before = pids(b)
    assert before == [first.popen.pid, second.popen.pid]
    done = cli(b, "upgrade", "--pid", str(before[1]), timeout=200)
    assert done.returncode == 0 and "vbd-2-51712" in done.stdout and "vbd-1-51712" not in done.stdout, done
    assert pids(b)[0] == before[0] and before[1] not in pids(b)
    done = cli(b, "upgrade", timeout=200)
    assert done.returncode == 0 and "vbd-2-51712" in done.stdout and "vbd-1-51712" in done.stdout, done
    assert not set(pids(b)) & set(before) and len(pids(b)) == 2
    assert first.end() == 0
    for disk in disks:
        disk.write(0, b"x" * 512)
        assert bytes(disk.read(0, 512)) == b"x" * 512
    done = cli(b, "upgrade", "--pid", "1")
    assert done.returncode == 1 and "no daemon with pid 1; there is" in done.stderr


def test_no_daemon(tmp_path: Path) -> None:
    class Nowhere:
        run_dir = tmp_path

    done = cli(Nowhere(), "upgrade")  # type: ignore[arg-type]
    assert done.returncode == 1 and "no daemon runs there" in done.stderr


def test_the_manager_is_told_who_it_is_now(bed: Callable[..., Bed], tmp_path: Path) -> None:
    """MAINPID before the old one ends; signs of life from the new one, whatever WATCHDOG_PID said."""
    with Manager(str(tmp_path / "notify")) as manager:
        b = bed()
        first = b.serve(NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="1500000")
        manager.until(lambda m: "READY" in m)
        manager.forget()
        done = cli(b, "upgrade", timeout=200)
        assert done.returncode == 0, done
        (new,) = pids(b)
        manager.until(lambda m: m.get("MAINPID") == str(new))
        assert first.popen.wait(10) == 0
        assert manager.gives_signs(1.5), "in none of three stretches"


def test_records(tmp_path: Path) -> None:
    """Who was killed is not taken for one that runs, and what it left is removed."""
    run_dir = tmp_path / ("long" * 30)
    run_dir.mkdir()
    source = "import sys, time, pathlib; from pvdrivers import daemons; r = daemons.Record(pathlib.Path(sys.argv[1]));"
    source += "r.file('devices.json').write_text('[]'); print('there', flush=True); time.sleep(60)"
    import sys

    child = subprocess.Popen([sys.executable, "-c", source, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "there\n"
    (found,) = daemons.running(run_dir)
    assert found.pid == child.pid and found.version == __version__ and abs(found.started - time.time()) < 60
    assert found.command[1] == "-c" and daemons.read(run_dir, found, "devices.json") == []
    assert (run_dir / "daemons").stat().st_mode & 0o777 == 0o700
    child.kill()
    child.wait()
    child.stdout.close()
    assert daemons.running(run_dir) == []
    record = daemons.Record(run_dir)
    assert sorted(p.name for p in (run_dir / "daemons").iterdir()) == [f"{os.getpid()}.json"]
    with daemons.listen(record.file("sock")) as listener:
        with daemons.connect(record.file("sock")):
            listener.accept()[0].close()
    record.remove()
    assert list((run_dir / "daemons").iterdir()) == []
