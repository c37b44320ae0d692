"""Pages of ours that a backend was given, and what is done when they are taken back."""

from __future__ import annotations

from collections.abc import Sequence

from pvdrivers.platform import GuestPages, Pages


class Lent:
    """Grants that are ended one by one. What the backend still has mapped is tried again each time, and never used for
    anything else."""

    def __init__(self, pages: GuestPages) -> None:
        self._pages = pages
        self._left: list[tuple[Sequence[int], Sequence[Pages]]] = []

    def take_back(self, *lent: tuple[Sequence[int], Sequence[Pages]]) -> None:
        """End these grants, and those that are left from before; what is behind them is freed as all of them end."""
        left: list[tuple[Sequence[int], Sequence[Pages]]] = []
        for grefs, behind in (*self._left, *lent):
            held = [gref for gref in grefs if not self._pages.end(gref)]
            if held:
                left.append((held, behind))
            else:
                for some in behind:
                    some.free()
        self._left = left

    @property
    def stuck(self) -> int:
        """Grants that a backend did not give back when it should have."""
        return sum(len(grefs) for grefs, _ in self._left)
