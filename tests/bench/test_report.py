"""The one form of all rows: what is met, what is missed, and how it is shown."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from pvdrivers.bench import report
from pvdrivers.cli import bench as verb
from pvdrivers.cli.arguments import parser

MACHINE = {
    "command": "pvdrivers bench blk", "date": "2026-11-20T10:00:00+00:00", "cpu": "a | b", "cpus": [0, 1],
    "kernel": "6.1", "python": "3.11", "numba": "0.61", "fio": None, "load": 0.5,
}  # fmt: skip


def runs(*rates: float) -> list[dict[str, Any]]:
    return [{"rate": rate, "cpu_us": 10.0, "p50_us": 50.0} for rate in rates]


def a_row(target: float | None = 0.97, **more: Any) -> report.Row:
    ours, theirs = runs(*range(90, 99)), runs(*[100.0] * 9)
    return report.row_of_pairs("reads", "fio", ours, theirs, target=target, ours_where="here", **more)


def test_a_row_of_pairs_has_what_is_needed_to_check_it() -> None:
    row = a_row()
    assert (row["ours"], row["theirs"], row["pairs"]) == (94, 100.0, 9)
    assert (row["median"], row["low"], row["high"]) == (0.94, 0.91, 0.97)
    assert row["met"] is True
    assert row["ours_cpu_us"] == 10.0 and row["theirs_mean_us"] is None
    assert len(row["raw"]["ours"]) == len(row["raw"]["theirs"]) == 9
    json.dumps(row)


@pytest.mark.parametrize(
    ("target", "sense", "met"),
    [(0.97, ">=", True), (0.98, ">=", False), (0.91, "<=", True), (0.90, "<=", False), (None, ">=", None)],
)
def test_a_target_is_missed_when_the_whole_interval_is_on_the_wrong_side(
    target: float | None, sense: str, met: bool | None
) -> None:
    assert a_row(target, sense=sense)["met"] is met


def test_a_row_of_values_has_a_limit_of_its_own() -> None:
    row = report.row_of_values("start", [1.0, 2.0, 1.2, 1.1, 1.4], unit="s", target=1.5)
    assert (row["ours"], row["met"]) == (1.2, True)
    assert report.row_of_values("start", [1.6, 2.0], unit="s", target=1.5)["met"] is False
    assert "<= 1.5 s" in report.text([row])


def test_the_table_says_what_was_met_missed_and_not_measured() -> None:
    shown = report.text([a_row(), a_row(0.98), {"work": "x", "beside": "qemu", "missing": "apt-get install qemu"}])
    lines = shown.splitlines()
    assert "0.94 [0.91, 0.97] of 9" in lines[2] and " met" in lines[2]
    assert "MISSED" in lines[3]
    assert lines[-1] == "not measured: x beside qemu: apt-get install qemu"
    assert report.text([]) == ""


@pytest.mark.parametrize(
    ("low", "high", "met"),
    [(0.99, 1.01, True), (0.5, 0.979, False), (0.5, 0.98, True), (1.02, 1.4, True), (1.03, 1.4, False), (0.5, 2, True)],
)
def test_what_is_to_be_within_so_much_of_1_may_miss_it_both_ways(low: float, high: float, met: bool) -> None:
    assert report.judged(low, high, 0.02, "within") is met
    assert "within 0.02" in report.text([a_row(target=0.02, sense="within")])


def test_markdown_has_a_cell_for_each_heading_in_every_line() -> None:
    rows = [a_row(note="a | b"), {"work": "x", "beside": None, "missing": "no fio"}]
    lines = report.markdown(rows, MACHINE).splitlines()
    assert lines[1] == ""
    bars = {line.count("|") for line in lines[2:]}
    assert bars == {len(report.COLUMNS) + 1}
    assert "not measured: no fio" in lines[-1]


def test_rows_of_the_ring_and_of_xenstore_come_in_the_same_form() -> None:
    ring = {"work": "1 page", "ours": 2e6, "theirs": 1e6, "median": 2.0, "low": 1.9, "high": 2.1, "pairs": 5,
            "target": 1.0, "where": "cpu 0 and 1", "ours_cpu_ns": 500.0, "theirs_cpu_ns": 1000.0}  # fmt: skip
    store = {"name": "xenstore read", "placement": "free", "unit": "ns", "ours": 10, "theirs": 5, "ratio": 0.2,
             "ratio_low": 0.1, "ratio_high": 0.3, "pairs": 5}  # fmt: skip
    lacking = {"name": "xenstore", "missing": "no xenstored"}
    rows = report.common("ring", [ring]) + report.common("xenstore", [store, lacking])
    assert [row.get("met") for row in rows] == [True, False, None]
    assert rows[0]["ours_cpu_us"] == 0.5
    shown = report.text(rows)
    assert "2 M/s" in shown and "C xenstored" in shown and "no xenstored" in shown


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(88_123.0, "/s", "88.1 k/s"), (4.5e9, "B/s", "4.5 GB/s"), (12.34, "us", "12.3 us"), (1234.5, "us", "1234 us"),
     (3.0, "/s", "3 /s"), (None, "us", "")],
)  # fmt: skip
def test_figures_are_shown_as_people_read_them(value: float | None, unit: str, shown: str) -> None:
    assert report.number(value, unit) == shown


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the verb had measured; each measurement is replaced by one row."""
    seen: list[str] = []

    def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
        seen.append(name)
        return [a_row()]

    monkeypatch.setattr(verb, "_measure", measure)
    monkeypatch.setattr(verb, "describe", lambda: MACHINE)
    return seen


def test_the_verb_prints_json_or_markdown_or_a_table(measured: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert verb.run(parser().parse_args("bench blk --json".split())) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["machine"]["kernel"] == "6.1"
    assert document["rows"][0]["bench"] == "blk"
    assert verb.run(parser().parse_args("bench all --markdown".split())) == 0
    assert measured[1:] == list(verb.ALL)
    assert capsys.readouterr().out.count("0.94 [0.91, 0.97] of 9") == len(verb.ALL)
    assert verb.run(parser().parse_args("bench fairness".split())) == 0
    assert "kernel 6.1" in capsys.readouterr().out
