"""docs/dom0.md: every command line of ours in it is one, what it names is there, and every message is one of ours."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvdrivers.cli.arguments import parser
from pvdrivers.storage.uri import OPTIONS, parse_xl
from pvdrivers.storage.xl_disk import parse_xl_disk

TOP = Path(__file__).resolve().parents[2]
PAGE = TOP / "docs/dom0.md"
TEXT = PAGE.read_text()
BLOCKS = [line.strip() for line in TEXT.splitlines() if line.startswith("    ")]
SPANS = re.findall(r"`([^`]+)`", TEXT)


def ours(text: str) -> Iterator[list[str]]:
    """The words of a line that runs the program, after its name."""
    if match := re.match(r"(?:[A-Z_]+=\S+ )*(?:/opt/pvdrivers/bin/)?pvdrivers\s+(?=\S)", text):
        yield shlex.split(text[match.end() :], comments=True)


COMMANDS = [words for text in [*BLOCKS, *SPANS] for words in ours(text)]


def test_there_are_commands() -> None:
    assert {words[0] for words in COMMANDS} >= {
        "serve", "check", "warm", "upgrade", "stats", "block-attach", "block-detach", "block-list",
    }  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_one(words: list[str]) -> None:
    stands_for = {"PID": "1", "SECONDS": "1"}
    if words == ["block-attach"] or "--help" in words:  # only spoken of
        words = ["block-attach", "web", "/dev/null,,xvda"]
    args = parser().parse_args([stands_for.get(word, word) for word in words])
    if args.verb == "block-attach":
        assert parse_xl_disk(args.disk).vdev.startswith("xvd")


def test_options_in_the_unit_are_options() -> None:
    found = re.findall(r"PVDRIVERS_OPTIONS=\"([^\"]*)\"", TEXT)
    assert len(found) >= 3
    for words in found:
        parser().parse_args(["serve", *shlex.split(words)])


def test_targets_are_read() -> None:
    found = [span.removeprefix("target=") for span in SPANS if span.startswith("target=/")]
    assert found and [parse_xl(target).queues for target in found] == [2] * len(found)
    table = TEXT[TEXT.index("| option | |") : TEXT.index("`pvdrivers block-attach --help`")]
    names = re.findall(r"`(\w+)=`", table)
    assert len(names) > 8 and set(names) <= set(OPTIONS)


def test_the_disk_is_that_of_the_example() -> None:
    (line,) = [line for line in BLOCKS if line.startswith("disk = ")]
    assert "".join(line.split()) in "".join((TOP / "examples/dom0/guest.cfg").read_text().split())


@pytest.mark.parametrize("name", sorted(set(re.findall(r"examples/dom0/[\w.@-]+[\w]", TEXT))))
def test_an_example_is_there(name: str) -> None:
    assert (TOP / name).is_file()


def test_links_lead_somewhere() -> None:
    for name, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", TEXT):
        target = PAGE.parent / name if name else PAGE
        assert target.is_file(), name
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, (name, anchor)


def constants() -> Iterator[str]:
    """Every text in the sources; of one with values in it, what stands between them."""
    for package in ("rings", "pvdrivers", "blkback"):
        for path in (TOP / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_every_message_is_one_of_ours() -> None:
    everything = "\n".join(constants())
    table = TEXT[TEXT.index("## Troubles") : TEXT.index("## What is supported")]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 20
    for row in rows:
        for message in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            assert message in everything, f"no message of ours: {message!r}"


def test_what_is_tested_names_its_test() -> None:
    table = TEXT[TEXT.index("## What is supported") :]
    rows = [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| ")]
    named = {name for state in rows for name in re.findall(r"`([\w./]+\.py)`", state)}
    assert named
    for name in named:
        assert (TOP / name).is_file() or (TOP / "tests/xen" / name).is_file(), name
    assert all("test_" in state for state in rows if state.startswith("tested"))
