"""The shell around the verbs: help without weight, errors in one line, signals and pipes without noise."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pvdrivers import __version__, cli
from pvdrivers.cli.arguments import parser
from pvdrivers.errors import PvError

VERBS = (
    "sim", "serve", "guest", "demo", "bench", "stats", "capture", "warm", "check", "upgrade", "block-attach",
    "block-detach", "block-list", "network-attach", "network-detach", "network-list",
)  # fmt: skip
HEAVY = ("numpy", "numba", "llvmlite", "cffi", "_cffi_backend", "ctypes", "socket", "subprocess", "asyncio")
# Runs the command line as the script does, then writes what of HEAVY it has loaded.
PROBE = f"""
import sys
from pvdrivers.cli import main
status = main(sys.argv[1:])
print("loaded:", *[name for name in {HEAVY!r} if name in sys.modules])
sys.exit(status)
"""


def command(*args: str, source: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "pvdrivers"] if source is None else ["-c", source]
    return subprocess.run(
        [sys.executable, *start, *args], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A body for the verb `warm` whose `run` a test fills in."""
    body = ModuleType("pvdrivers.cli.warm")
    monkeypatch.setitem(sys.modules, body.__name__, body)
    yield body


def raising(error: BaseException):  # type: ignore[no-untyped-def]
    def run(args: object) -> int:
        raise error

    return run


# Light


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_loads_nothing_heavy(args: list[str]) -> None:
    done = command(*args, source=PROBE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_a_mistake_loads_nothing_heavy_either() -> None:
    done = command("serve", "--workers", "none", source=PROBE)
    assert done.returncode == 2
    assert done.stdout.splitlines() == ["loaded:"]


def test_every_verb_is_in_the_help() -> None:
    text = parser().format_help()
    assert [verb for verb in VERBS if not re.search(rf"\n    {verb}\s", text)] == []


def test_no_verb_is_declared_without_a_test() -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["no-such-verb"])
    choices = next(a.choices for a in parser()._actions if a.dest == "verb")
    assert tuple(choices or ()) == VERBS


# Options


def test_version() -> None:
    assert command("--version").stdout == f"pvdrivers {__version__}\n"


def test_guest_options() -> None:
    args = parser().parse_args(
        "guest --run-dir d --disk a.img,ro=1 --disk null: --nbd unix:/x/y --queues 2 --ring-order 2"
        " --abi x86_32 --persistent off --indirect 0 --untrusted-backend --memory 64".split()
    )
    assert (args.run_dir, args.disks, args.nbd) == (Path("d"), ["a.img,ro=1", "null:"], Path("/x/y"))
    assert (args.queues, args.ring_order, args.abi, args.persistent) == (2, 2, "x86_32", False)
    assert (args.indirect, args.untrusted_backend, args.memory) == (0, True, 64)


def test_serve_options() -> None:
    args = parser().parse_args("serve --run-dir d --domain 1 2 --domain 7 --class vbd --no-journal".split())
    assert (args.domains, args.classes, args.journal, args.strict) == ([1, 2, 7], ["vbd"], False, False)
    args = parser().parse_args("serve --run-dir d".split())
    assert (args.domains, args.classes, args.journal, args.workers, args.spin) == (
        None,
        None,
        True,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("guest", "name a disk with --disk, or a vif with --net"),
        ("guest --net switch:,tap=", "tap='' is no name of an interface"),
        ("guest --net switch:,mtu=0", "mtu='0' is no number from 1"),
        ("guest --net switch:,speed=9", "'speed' is not one of csum, gso, hash, mac, mtu, queues, sg, tap"),
    ],
)
def test_a_guest_that_makes_no_sense(line: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("serve --domain 32752", "'32752' is not a domain id (0 to 32751)"),
        ("serve --domain -1", "'-1'"),
        ("serve --workers 0", "'0' is not a whole number of at least 1"),
        ("serve --spin 1.5", "'1.5' is not a whole number of at least 0"),
        ("serve --spin \u0663", "is not a whole number"),  # an Arabic digit is a digit to str.isdigit
        ("serve --journ", "unrecognized arguments: --journ"),
        ("guest --disk null: --nbd /tmp/x", "'/tmp/x' is not unix:PATH"),
        ("guest --disk null: --nbd unix:", "'unix:' is not unix:PATH"),
        ("guest --disk null: --persistent maybe", "'maybe' is neither on nor off"),
        ("guest --disk null: --ring-order 5", "invalid choice: 5"),
        ("bench", "the following arguments are required: what"),
        ("bench sleep", "invalid choice: 'sleep'"),
        ("", "the following arguments are required: VERB"),
    ],
)
def test_a_mistake_is_named(line: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err


@pytest.mark.parametrize("verb_name", ["sim", "serve", "stats"])
def test_without_a_safe_place_the_run_directory_must_be_given(
    verb_name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PVDRIVERS_RUN_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main([verb_name]) == 2
    assert "--run-dir" in capsys.readouterr().err
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert parser().parse_args([verb_name]).run_dir == Path("/run/user/1000/pvdrivers")
    monkeypatch.setenv("PVDRIVERS_RUN_DIR", "/odd%place")
    assert parser().parse_args([verb_name]).run_dir == Path("/odd%place")
    assert cli.main([verb_name, "--help"]) == 0


# Ends


def test_the_status_of_a_verb_is_that_of_the_command(verb: ModuleType) -> None:
    verb.run = lambda args: 3
    assert cli.main(["warm"]) == 3


def test_an_error_for_the_user_is_one_line_and_status_1(
    verb: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.run = raising(PvError("disk.img: no such file"))
    assert cli.main(["warm"]) == 1
    assert capsys.readouterr() == ("", "pvdrivers: error: disk.img: no such file\n")


def test_a_fault_of_ours_is_not_dressed_up(verb: ModuleType) -> None:
    verb.run = raising(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["warm"])


def test_interrupt(verb: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    verb.run = raising(KeyboardInterrupt())
    assert cli.main(["warm"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_broken_socket_is_not_taken_for_a_broken_pipe(verb: ModuleType, tmp_path: Path) -> None:
    verb.run = raising(BrokenPipeError("a peer"))
    with (tmp_path / "out").open("w") as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError):
            cli.main(["warm"])


def test_the_handler_of_sigterm_is_put_back(verb: ModuleType) -> None:
    before = signal.getsignal(signal.SIGTERM)
    verb.run = lambda args: 0
    cli.main(["warm"])
    assert signal.getsignal(signal.SIGTERM) is before


STANDING = """
import sys, time, types
body = types.ModuleType("pvdrivers.cli." + sys.argv[1])
def run(args):
    try:
        print("up", flush=True)
        time.sleep(60)
    finally:
        print("down")
body.run = run
sys.modules[body.__name__] = body
from pvdrivers.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("args", "number", "status"),
    [
        (["serve", "--run-dir", "d"], signal.SIGTERM, 0),
        (["demo"], signal.SIGTERM, 143),
        (["serve", "--run-dir", "d"], signal.SIGINT, 130),
    ],
)
def test_signals_end_a_verb_in_order(args: list[str], number: signal.Signals, status: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STANDING, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        running.send_signal(number)
        out, err = running.communicate(timeout=30)
    assert (running.returncode, out, err) == (status, "down\n", "")


FLOWING = STANDING.replace("time.sleep(60)", "[print('x' * 100) for _ in range(10_000)]")


@pytest.mark.parametrize("source", [STANDING.replace("time.sleep(60)", "sys.stdin.read()"), FLOWING])
def test_a_reader_that_goes_away_is_met_quietly(source: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", source, "demo"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        assert running.stdin is not None and running.stdout is not None and running.stderr is not None
        assert running.stdout.readline() == "up\n"
        running.stdout.close()
        running.stdin.close()  # one of them writes only now
        err = running.stderr.read()
        deadline = time.monotonic() + 30
        while running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert (running.returncode, err) == (141, "")


def test_a_cache_directory_of_others_is_an_error_for_the_user(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    source = """
import sys, types
body = types.ModuleType("pvdrivers.cli.warm")
def run(args):
    import rings.jit
body.run = run
sys.modules[body.__name__] = body
from pvdrivers.cli import main
sys.exit(main(["warm"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PVDRIVERS_CACHE_DIR": str(tmp_path), "NUMBA_DISABLE_JIT": "0"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("pvdrivers: error: ")
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr
