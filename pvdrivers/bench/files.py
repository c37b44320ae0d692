"""The files that disks are made of while they are measured: real data, made when first wanted, removed afterwards."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from .machine import Missing

__all__ = ["FILE_SIZE", "DataFile", "Files", "default_directory", "shared_memory"]

FILE_SIZE, MEMORY_FILE_SIZE = 1 << 30, 512 << 20
_PIECE = 4 << 20


def default_directory() -> Path:
    """Where the file of the O_DIRECT rows goes unless told: a real file system, we hope."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")


def shared_memory() -> Path | None:
    """A tmpfs that we may write to, None if there is none."""
    path = Path("/dev/shm")
    return path if os.access(path, os.W_OK) and os.path.ismount(path) else None


class DataFile:
    """A file with real data, removed afterwards: nothing sparse, nothing that compresses or is not yet written."""

    def __init__(self, directory: Path, size: int) -> None:
        """Raises OSError when there is no room."""
        descriptor, name = tempfile.mkstemp(prefix="pvdrivers-bench-", suffix=".img", dir=directory)
        self.path, self.size = Path(name), size
        try:
            piece = secrets.token_bytes(_PIECE)
            left = size
            while left > 0:
                left -= os.write(descriptor, piece[:left])
            os.fsync(descriptor)
        except BaseException:
            self.path.unlink()
            raise
        finally:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)


@dataclass
class Files:
    """The files of a run, which `stack` removes at its end."""

    stack: contextlib.ExitStack
    directory: Path
    size: int = FILE_SIZE
    made: dict[str, Path] = field(default_factory=dict)

    def path(self, kind: str) -> Path:
        """The file of a kind: "disk", on a real file system, or "tmpfs". Raises Missing."""
        if kind not in self.made:
            directory, size = self.directory, self.size
            if kind == "tmpfs":
                shm = shared_memory()
                if shm is None:
                    raise Missing("no tmpfs at /dev/shm that we may write to")
                directory, size = shm, min(size, MEMORY_FILE_SIZE)
            elif not _direct(directory):
                raise Missing(f"no O_DIRECT in {directory}; name a directory on a real file system with --dir")
            try:
                self.made[kind] = self.stack.enter_context(DataFile(directory, size)).path
            except OSError as e:
                raise Missing(f"{directory}: {e.strerror}; {size >> 20} MiB are wanted") from e
        return self.made[kind]


def _direct(directory: Path) -> bool:
    """Whether O_DIRECT works in this directory, and is no page cache in disguise (tmpfs takes the flag)."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as probe:
            os.close(os.open(probe.name, os.O_RDONLY | os.O_DIRECT))
            device = os.stat(probe.name).st_dev
            mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return False
    in_memory = {m[1] for m in mounts if m[2] in ("tmpfs", "ramfs")}
    return not any(os.path.isdir(point) and os.stat(point).st_dev == device for point in in_memory)
