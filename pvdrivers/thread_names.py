"""Names of threads, as the kernel has them: top -H and taskset see them, and the benchmark puts each on a core."""

from __future__ import annotations

import threading
from pathlib import Path


def name_thread(name: str) -> None:
    """Name the calling thread, in 15 characters at the most."""
    try:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
    except OSError:
        pass  # it is only a name
