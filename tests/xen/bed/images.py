"""All images of the bed, made or found in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import debian, dom0, fio, guest, kernels, project
from .steps import BedError, locked, say


@dataclass(frozen=True)
class Images:
    """Paths of what QEMU boots."""

    xen: Path
    dom0_kernel: Path
    dom0_initrd: Path
    dom0_root: Path
    project: Path


def build() -> Images:
    """Make what is missing or out of date. Raises BedError."""
    with locked():
        lines = debian.sources()
        apt = debian.apt("apt", lines)
        hypervisor = dom0.xen(apt)
        root = dom0.root_tree(lines, apt)
        static_fio = fio.fio(apt)
        own = kernels.kernel("kernel-debian", apt)
        all_kernels = {"debian": own}
        try:
            all_kernels["backports"] = kernels.kernel(
                "kernel-backports", debian.apt("apt-backports", [debian.backports(lines)])
            )
        except BedError as e:
            say(f"no newer guest kernel, since the mirror has no backports: {str(e).splitlines()[-1]}")
        guests = {name: guest.guest(one, name, root, static_fio) for name, one in all_kernels.items()}
        image = dom0.dom0_image(root, own, guests, guest.guest_disk(root, static_fio))
        code = project.project_image(root, project.compiled(root))
    return Images(
        xen=hypervisor / "xen",
        dom0_kernel=own.vmlinux,
        dom0_initrd=image / "initrd",
        dom0_root=image / "root.ext4",
        project=code / "project.ext4",
    )
