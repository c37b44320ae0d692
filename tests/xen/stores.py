"""What disks are made of: files in memory, and loop devices on them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from .system import sh


class Stores:
    """Makes them below a directory, and takes all of them away again."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self._loops: list[str] = []
        self._files: list[Path] = []

    def file(self, name: str, mib: int = 64, *, random: bool = False) -> Path:
        """A file of that size: sparse, or with random content."""
        path = self.top / name
        with path.open("wb") as f:
            if random:
                for _ in range(mib):
                    f.write(os.urandom(1 << 20))
            else:
                f.truncate(mib << 20)
        self._files.append(path)
        return path

    def copy(self, source: Path, name: str) -> Path:
        """A copy that may be written to."""
        path = self.top / name
        sh("cp", "--sparse=always", source, path)
        self._files.append(path)
        return path

    def loop(self, path: Path, *words: str) -> str:
        """A loop device on a file; `words` are losetup's."""
        device = sh("losetup", "-f", "--show", *words, path).strip()
        self._loops.append(device)
        return device

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for device in self._loops:
            sh("losetup", "-d", device, check=False)
        for path in self._files:
            path.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
