"""What a guest boots: an initramfs with a shell's tools, fio and ext4, and the same tree as a root disk."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from .kernels import Kernel
from .steps import FILES, Made, make_ext4, run, step

TOOLS = """
    mkfs.ext4 e2fsck resize2fs fstrim blkdiscard blockdev dd cmp strace
    ip ping ethtool iperf3 tcpdump
""".split()
"""Programs with their libraries, out of the dom0 root, where busybox has none or a lesser one."""
GUEST_MODULES = ["xen-blkfront", "xen-netfront", "ext4", "overlay", "crc32c-intel", "crc32c_generic"]
DOM0_MODULES = ["virtio_pci", "virtio_blk", "9pnet_virtio", "9p", "ext4", "overlay", "crc32c-intel", "crc32c_generic"]


def initrd(tree: Path, kernel: Kernel, modules: list[str], busybox: Path, out: Path) -> None:
    """Complete a tree to an initramfs: busybox, modules in the order to load them in, the first program."""
    for directory in ("bin", "dev", "proc", "sys", "tmp", "modules.d"):
        (tree / directory).mkdir(exist_ok=True)
    shutil.copy(busybox, tree / "bin/busybox")
    names = []
    for number, path in enumerate(kernel.load_order(*modules)):
        names.append(f"/modules.d/{number:02}/{path.name}")
        (tree / f"modules.d/{number:02}").mkdir()
        shutil.copy(path, tree / names[-1][1:])
    (tree / "modules").write_text("".join(f"{name}\n" for name in names))
    shutil.copy(FILES / "initrd-init", tree / "init")
    (tree / "init").chmod(0o755)
    names_in_tree = run("find", ".", cwd=tree).encode()
    with open(out, "wb") as archive:
        cpio = ["cpio", "-o", "-H", "newc", "--quiet", "-R", "0:0"]
        subprocess.run(cpio, cwd=tree, input=names_in_tree, stdout=archive, check=True)


def guest_tree(root: Path, static_fio: Path, tree: Path) -> None:
    """The userland of a guest: TOOLS with their libraries, fio, the agent."""
    for directory in ("bin", "sbin", "etc", "root", "mnt", "run", "lib", "lib64", "usr", "var"):
        (tree / directory).mkdir(parents=True)
    found = [_find(root, tool) for tool in TOOLS]
    listing = run("chroot", root, "ldd", *found)
    libraries = {word for line in listing.splitlines() for word in line.split() if word.startswith("/lib")}
    for path in [*found, *sorted(word.rstrip(":") for word in libraries)]:
        target = tree / ("bin/" + Path(path).name if path in found else path[1:])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy((root / path[1:]).resolve() if not (root / path[1:]).is_symlink() else _inside(root, path), target)
    shutil.copy(static_fio, tree / "bin/fio")
    shutil.copy(FILES / "agent", tree / "agent")
    (tree / "agent").chmod(0o755)
    (tree / "etc/mtab").symlink_to("/proc/self/mounts")


def _find(root: Path, tool: str) -> str:
    for directory in ("/usr/sbin", "/usr/bin", "/sbin", "/bin"):
        if (root / directory[1:] / tool).exists() or (root / directory[1:] / tool).is_symlink():
            return f"{directory}/{tool}"
    raise FileNotFoundError(f"{tool} is not in the dom0 root")


def _inside(root: Path, path: str) -> Path:
    """A path in the root with its links followed there."""
    return root / run("chroot", root, "readlink", "-f", path).strip()[1:]


def guest(kernel: Kernel, name: str, root: Made, static_fio: Made) -> Made:
    """The directory of one guest kernel: vmlinux, initrd, version."""

    def make(out: Path) -> None:
        guest_tree(root.path, static_fio / "fio", out / "tree")
        initrd(out / "tree", kernel, GUEST_MODULES, _inside(root.path, "/bin/busybox"), out / "initrd")
        shutil.rmtree(out / "tree")
        shutil.copy(kernel.vmlinux, out / "vmlinux")
        (out / "version").write_text(kernel.version)

    inputs = [kernel.made.key, root.key, static_fio.key, Path(__file__), FILES / "initrd-init", FILES / "agent"]
    return step(f"guest-{name}", inputs, make)


def guest_disk(root: Made, static_fio: Made) -> Made:
    """A root disk for guests, root.ext4: the same programs on ext4."""

    def make(out: Path) -> None:
        tree = out / "tree"
        guest_tree(root.path, static_fio / "fio", tree)
        for directory in ("dev", "proc", "sys", "tmp"):
            (tree / directory).mkdir()
        shutil.copy(_inside(root.path, "/bin/busybox"), tree / "bin/busybox")
        for applet in run("chroot", root.path, "/bin/busybox", "--list").split():
            if not (tree / "bin" / applet).exists():
                (tree / "bin" / applet).symlink_to("busybox")
        make_ext4(tree, out / "root.ext4", spare_mib=24)
        shutil.rmtree(tree)

    return step("guest-disk", [root.key, static_fio.key, Path(__file__), FILES / "agent"], make)
