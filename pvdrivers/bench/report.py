"""One form for the rows of all measurements: a table for a terminal, one for the documentation, JSON to check both.

A row has: bench, work, beside, unit, ours and theirs (medians), median, low, high and pairs of the ratio, target with
its sense (">=" or "<=", or "within" so much of 1), met, ours_where and theirs_where, ours_cpu_us and theirs_cpu_us (CPU
of both ends, for each request), raw (what each single run said) and note. A row that was not measured has `missing`
instead of figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import compare

__all__ = ["COLUMNS", "common", "judged", "markdown", "median_of", "row_of_pairs", "row_of_values", "text"]

Row = dict[str, Any]

COLUMNS = {
    "work": "work",
    "beside": "beside",
    "ours": "ours",
    "theirs": "beside it",
    "ratio": "ratio [95 %]",
    "target": "target",
    "met": "target is",
    "where": "ours ran",
    "theirs_where": "the other ran",
    "cpu": "CPU us an I/O",
    "note": "note",
}


def row_of_pairs(
    work: str,
    beside: str,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    *,
    key: str = "rate",
    unit: str = "/s",
    target: float | None = None,
    sense: str = ">=",
    **more: Any,
) -> Row:
    """A row from runs of both, in the order in which they were paired; `key` is what is compared."""
    ratio = compare.paired([run[key] for run in ours], [run[key] for run in theirs])
    row: Row = {
        "work": work,
        "beside": beside,
        "unit": unit,
        "ours": statistics.median(run[key] for run in ours),
        "theirs": statistics.median(run[key] for run in theirs),
        "median": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "pairs": ratio.n,
        "target": target,
        "sense": sense,
        "met": judged(ratio.low, ratio.high, target, sense),
        **more,
        "raw": {"ours": list(ours), "theirs": list(theirs)},
    }
    for who, runs in (("ours", ours), ("theirs", theirs)):
        for name in ("cpu_us", "p50_us", "p99_us", "mean_us"):
            row[f"{who}_{name}"] = median_of(runs, name)
    return row


def median_of(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Of a figure that some runs may lack."""
    values = [run[name] for run in runs if run.get(name) is not None]
    return statistics.median(values) if values else None


def row_of_values(
    work: str, values: Sequence[float], *, unit: str, target: float | None = None, sense: str = "<=", **more: Any
) -> Row:
    """A row that stands beside nothing: a limit of its own says what it must be."""
    spread = compare.paired(values, [1.0] * len(values))
    return {
        "work": work,
        "beside": None,
        "unit": unit,
        "ours": spread.median,
        "ours_low": spread.low,
        "ours_high": spread.high,
        "target": target,
        "sense": sense,
        "met": judged(spread.low, spread.high, target, sense),
        **more,
        "raw": {"ours": list(values)},
    }


def judged(low: float, high: float, target: float | None, sense: str = ">=") -> bool | None:
    """A target is missed when the whole interval lies on the wrong side of it; None without a target."""
    if target is None:
        return None
    if sense == "within":
        return low <= 1 + target and high >= 1 - target
    return high >= target if sense == ">=" else low <= target


def common(bench: str, rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of any measurement in the one form."""
    made: list[Row] = []
    for row in rows:
        new: Row = {"bench": bench, **row}
        if bench == "ring":
            new |= {
                "work": f"ring, {row['work']}", "beside": "C, Xen's macros", "unit": "/s",
                "ours_where": row.get("where"), "theirs_where": row.get("where") if row.get("theirs") else None,
            }  # fmt: skip
            for who in ("ours", "theirs"):
                cpu = row.get(f"{who}_cpu_ns")
                new[f"{who}_cpu_us"] = None if cpu is None else cpu / 1000
        elif bench == "xenstore":
            new |= {"work": row.get("work", row.get("name")), "beside": row.get("beside", "C xenstored")}
            if "missing" not in row:
                new |= {
                    "median": row.get("median", row.get("ratio")), "low": row.get("low", row.get("ratio_low")),
                    "high": row.get("high", row.get("ratio_high")), "target": row.get("target", 0.33),
                    "ours_where": row.get("placement"), "theirs_where": row.get("placement"),
                }  # fmt: skip
        new.setdefault("sense", ">=")
        if new.get("median") is not None:
            new["met"] = judged(new["low"], new["high"], new.get("target"), new["sense"])
        made.append(new)
    return made


def text(rows: Sequence[Row]) -> str:
    """The rows as a table for people, notes of what is missing below it."""
    measured = [_cells(row) for row in rows if "missing" not in row]
    lines = [compare.table(measured, COLUMNS)] if measured else []
    lines += [
        f"not measured: {row['work']} beside {row['beside'] or 'its limit'}: {row['missing']}"
        for row in rows
        if "missing" in row
    ]
    return "\n".join(lines)


def markdown(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """The rows as the table of docs/benchmarks.md, and one line about the machine."""
    lines = [
        f"`{machine['command']}` on {machine['date'][:10]}: {machine['cpu']}, {len(machine['cpus'])} cores,"
        f" Linux {machine['kernel']}, Python {machine['python']}, numba {machine['numba']},"
        f" {machine['fio'] or 'no fio'}, load {machine['load']:.1f} at the start.",
        "",
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        if "missing" in row:
            cells = {"work": row["work"], "beside": row["beside"] or "", "note": f"not measured: {row['missing']}"}
        else:
            cells = _cells(row)
        lines.append("| " + " | ".join(str(cells.get(key) or "").replace("|", "/") for key in COLUMNS) + " |")
    return "\n".join(lines)


def _cells(row: Row) -> dict[str, str]:
    unit = row.get("unit", "")
    ratio = ""
    if row.get("median") is not None:
        ratio = f"{row['median']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        if row.get("pairs"):
            ratio += f" of {row['pairs']}"
    target, met = row.get("target"), row.get("met")
    cpu = [row.get("ours_cpu_us"), row.get("theirs_cpu_us")]
    return {
        "work": row["work"],
        "beside": row["beside"] or "",
        "ours": number(row.get("ours"), unit),
        "theirs": number(row.get("theirs"), unit),
        "ratio": ratio,
        "target": "" if target is None else f"{row['sense']} {target:g}{f' {unit}' if row['beside'] is None else ''}",
        "met": "" if met is None else ("met" if met else "MISSED"),
        "where": row.get("ours_where") or "",
        "theirs_where": row.get("theirs_where") or "",
        "cpu": " / ".join("-" if c is None else f"{c:.3g}" for c in cpu) if any(c is not None for c in cpu) else "",
        "note": row.get("note") or "",
    }


def number(value: float | None, unit: str) -> str:
    """A figure as people read it: 88.1 k/s, 4.5 GB/s, 12 us."""
    if value is None:
        return ""
    if unit in ("/s", "B/s"):
        for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if abs(value) >= size:
                return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}" if abs(value) < 1000 else f"{value:.0f} {unit}"
