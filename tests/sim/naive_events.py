"""Event channels as one would explain them: the twin that both ABIs are held against."""

from __future__ import annotations


class NaiveEvents:
    """Pending ports in a dict, with the order in which each was last queued."""

    def __init__(self) -> None:
        self.pending: set[int] = set()
        self.masked: set[int] = set()

    def signal(self, port: int) -> None:
        self.pending.add(port)

    def mask(self, port: int) -> None:
        self.masked.add(port)

    def unmask(self, port: int) -> None:
        self.masked.discard(port)

    def forget(self, port: int) -> None:
        self.pending.discard(port)
        self.masked.discard(port)

    def deliverable(self) -> set[int]:
        return self.pending - self.masked

    def took(self, port: int) -> None:
        """A port was given to its owner: it is cleared, and masked until unmask."""
        assert port in self.deliverable()
        self.pending.discard(port)
        self.masked.add(port)
