"""``pvdrivers check``: true findings, and a status that scripts can use."""

from __future__ import annotations

import argparse
import errno

import pytest

from pvdrivers.cli import check, main


def run(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    status = check.run(argparse.Namespace())
    return status, capsys.readouterr().out.splitlines()


def test_this_host_will_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "pvdrivers can run here"
    assert all(line.startswith(("ok ", "missing ", "         ")) for line in lines[:-1])


def test_an_essential_lack_is_status_1_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.memfd_create", refuse)
    status, lines = run(capsys)
    assert status == 1
    assert lines[-1] == "pvdrivers cannot run here without: memfd"
    at = next(n for n, line in enumerate(lines) if line.split()[:2] == ["missing", "memfd"])
    assert "Operation not permitted" in lines[at]
    assert lines[at + 1].lstrip().startswith("-> ")


def test_a_lack_that_only_costs_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "_SYS_IO_URING_SETUP", 999_999)  # ENOSYS, as on a kernel without it
    status, lines = run(capsys)
    assert status == 0
    assert any(line.startswith("missing") and "Function not implemented" in line for line in lines)


@pytest.mark.parametrize(
    ("code", "setting", "advice"),
    [
        (errno.EPERM, "2", "sysctl kernel.io_uring_disabled=0"),
        (errno.EPERM, "0", "allow io_uring_setup"),
        (errno.EPERM, None, "allow io_uring_setup"),
        (errno.ENOSYS, None, "a kernel with io_uring"),
        (errno.ENOMEM, "0", "raise the limit of locked memory"),
    ],
)
def test_each_refusal_of_io_uring_has_its_advice(
    code: int, setting: str | None, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_try_io_uring", lambda: code)
    monkeypatch.setattr(check, "read", lambda path: setting)
    finding = check._io_uring()
    assert (finding.ok, finding.essential) == (False, False)
    assert finding.advice.startswith(advice)


def test_a_missing_package_is_essential() -> None:
    finding = check._package("no-such-package-of-anybody")
    assert (finding.ok, finding.essential, finding.advice) == (
        False,
        True,
        "pip install no-such-package-of-anybody",
    )


@pytest.mark.parametrize(("limit", "ok"), [(-1, True), (4096, True), (1024, False)])
def test_limits(limit: int, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.resource, "getrlimit", lambda which: (limit, -1))
    finding = check._open_files()
    assert finding.ok is ok
    assert ("unlimited" in finding.found.split("(")[0]) is (limit == -1)
