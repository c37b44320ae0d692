"""Who may use which numbers: frames and grefs of one domain, handed out in runs."""

from __future__ import annotations


class Extents:
    """Free runs of the numbers first .. first + count - 1, in order and merged."""

    def __init__(self, first: int, count: int) -> None:
        self._free: list[tuple[int, int]] = [(first, count)] if count > 0 else []

    def claim(self, count: int) -> int:
        """Take `count` numbers in a row and return the first, or -1 if there is no such run."""
        for i, (first, length) in enumerate(self._free):
            if length >= count:
                rest = (first + count, length - count)
                self._free[i : i + 1] = [rest] if rest[1] else []
                return first
        return -1

    def release(self, first: int, count: int) -> None:
        """Give a run back."""
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (first, count)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged

    @property
    def free(self) -> int:
        """How many numbers are left."""
        return sum(length for _, length in self._free)
