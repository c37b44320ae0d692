"""Kernels out of Debian's packages: a plain ELF, and modules that load quickly under emulation."""

from __future__ import annotations

import lzma
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .debian import Apt
from .steps import BedError, Made, run, step

MODULES = """
    ext4 overlay loop nbd null_blk crc32c_generic crc32c-intel
    virtio_pci virtio_blk virtio-rng 9pnet_virtio 9p
    xen-blkfront xen-netfront xen-blkback xen-netback xen-gntdev xen-gntalloc xen-evtchn xenfs xen-privcmd
    tun bridge veth dm-mod brd
""".split()  # fmt: skip
"""Kept, with what they need. Some are built in, in one kernel or another."""


@dataclass(frozen=True)
class Kernel:
    """`made` has vmlinux and lib/modules/VERSION."""

    made: Made
    version: str

    @property
    def vmlinux(self) -> Path:
        return self.made / "vmlinux"

    @property
    def tree(self) -> Path:
        return self.made / "lib"

    def load_order(self, *names: str) -> list[Path]:
        """The files of some modules and what they need, in the order to load them in."""
        top = self.made / f"lib/modules/{self.version}"
        lines = [line.split() for line in (top / "needs").read_text().splitlines()]
        needs = {_plain(path): [*before, path] for path, *before in lines}
        return [top / path for path in dict.fromkeys(p for name in names for p in needs.get(_plain(name), []))]


def _plain(path: str) -> str:
    """A module's name, which may be written with - or _, from its name or path."""
    return Path(path).name.split(".")[0].replace("-", "_")


def kernel(name: str, apt: Apt) -> Kernel:
    """The kernel that an apt calls linux-image-amd64."""

    def make(out: Path) -> None:
        package = apt.depends("linux-image-amd64")
        apt.unpack(package, out / "deb")
        version = package.removeprefix("linux-image-")
        unpacked = out / "deb/usr/lib/modules"
        modules = (unpacked if unpacked.exists() else out / "deb/lib/modules") / version
        _plain_elf((out / f"deb/boot/vmlinuz-{version}").read_bytes(), out / "vmlinux")
        _modules(modules, out / f"lib/modules/{version}")
        (out / "version").write_text(version)
        shutil.rmtree(out / "deb")

    made = step(name, [apt.key, Path(__file__)], make)
    return Kernel(made, (made / "version").read_text())


def _plain_elf(bzimage: bytes, out: Path) -> None:
    """Neither Xen nor libxl then has to unpack the kernel under emulation."""
    begin = (bzimage[0x1F1] or 4) * 512 + 512 + struct.unpack_from("<I", bzimage, 0x248)[0]
    packed = bzimage[begin : begin + struct.unpack_from("<I", bzimage, 0x24C)[0]]
    if packed[:6] == b"\xfd7zXZ\0":
        out.write_bytes(lzma.LZMADecompressor().decompress(packed))
    elif packed[:4] == b"\x28\xb5\x2f\xfd":
        out.write_bytes(subprocess.run(["zstd", "-dc"], input=packed[:-4], stdout=subprocess.PIPE, check=True).stdout)
    else:
        raise BedError(f"a kernel packed in an unknown way: {packed[:6].hex()}")


def _modules(source: Path, target: Path) -> None:
    """Only what is wanted; without BTF, debug information and signature, which take seconds to load."""
    order = [line.strip() for line in (source / "modules.order").read_text().splitlines()]
    by_name = {_plain(path): path for path in order}
    packed = any(source.rglob("*.ko.xz"))
    needs: dict[str, list[str]] = {}

    def want(name: str) -> list[str]:
        """A module and what it needs, in the order to load them in; nothing for what is built in."""
        path = by_name.get(_plain(name))
        if path is None:
            return []
        if path not in needs:
            data = lzma.decompress((source / f"{path}.xz").read_bytes()) if packed else (source / path).read_bytes()
            found = re.search(rb"\0depends=([^\0]*)", data)
            names = found.group(1).decode().split(",") if found else []
            needs[path] = list(dict.fromkeys(p for other in names for p in want(other)))
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(data)
            run("objcopy", "--strip-debug", "-R", ".BTF", target / path)
        return [*needs[path], path]

    target.mkdir(parents=True)
    for name in MODULES:
        want(name)
    (target / "needs").write_text("".join(f"{' '.join([path, *before])}\n" for path, before in needs.items()))
    (target / "modules.order").write_text("".join(f"{path}\n" for path in order if path in needs))
    for name in ("modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(source / name, target)
