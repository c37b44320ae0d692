"""How much this host lets us map, as far as it can be learned without a Xen library.

A mapped grant takes one maptrack handle of Xen, or two in a PV domain (gntdev maps the page for the process and for the
kernel). Xen keeps MAPTRACK_PER_FRAME handles in a frame, and `gnttab_max_maptrack_frames` is 1024 by default:
xen/common/grant_table.c. And a mapping is one of vm.max_map_count that the kernel lets a process have: it may be of one
page, and the hole beside it is another.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

MAPTRACK_PER_FRAME = 256
"""PAGE_SIZE / sizeof(struct grant_mapping), which has 16 bytes."""
DEFAULT_MAPTRACK_FRAMES = 1024
PARAMETER = "gnttab_max_maptrack_frames"
MAX_MAP_COUNT = "/proc/sys/vm/max_map_count"
OWN_MAPPINGS = 2048
"""Of a process, for itself: its program, threads, io_urings."""
_MAPPINGS_OF_A_PAGE = 2
"""At worst: the pages of a guest, and what is free, by turns."""
_OURS = 0.75
"""Of the handles: the kernel's own backends want some, too."""


def is_pv() -> bool:
    """Whether this domain is paravirtualised; if that cannot be told, it is not, which is always safe."""
    try:
        return Path("/sys/hypervisor/guest_type").read_text().strip() == "PV"
    except OSError:
        return False


def maptrack_frames() -> int:
    """What Xen was started with (xenhypfs, Xen 4.14 and later), or its default where that is not told."""
    tool = shutil.which("xenhypfs", path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/xen-4.17/bin")
    if tool is not None:
        command = [tool, "cat", f"/params/{PARAMETER}"]
        try:
            text = subprocess.run(command, capture_output=True, timeout=10, check=True).stdout.split()
            return int(text[-1], 0)
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            pass
    return DEFAULT_MAPTRACK_FRAMES


def mappable_pages(pv: bool) -> int:
    """Pages that our mappings may take all together."""
    return int(maptrack_frames() * MAPTRACK_PER_FRAME * _OURS) // (2 if pv else 1)


def max_map_count(root: Path = Path("/")) -> int | None:
    """Mappings that one process may have, None if that is not told."""
    try:
        return int((root / MAX_MAP_COUNT.lstrip("/")).read_text())
    except (OSError, ValueError):
        return None


def mapping_pages(maps: int | None) -> int | None:
    """Pages that a process with so many mappings may have mapped, wherever they lie in its windows."""
    return None if maps is None else max(maps - OWN_MAPPINGS, 0) // _MAPPINGS_OF_A_PAGE
