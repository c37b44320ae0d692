"""What `pvdrivers check` finds, one thing at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str
    advice: str = ""
    essential: bool = False

    def lines(self) -> Iterator[str]:
        """The finding as it is printed."""
        yield f"{'ok' if self.ok else 'missing':8} {self.name:16} {self.found}"
        if self.advice and not self.ok:
            yield f"{'':8} {'':16} -> {self.advice}"


def read(path: Path) -> str | None:
    """The text of a small file, None if it cannot be had."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
