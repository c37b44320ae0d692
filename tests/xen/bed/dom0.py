"""The root of dom0: Debian with Xen's tools, and a Python environment with what the project needs at run time."""

from __future__ import annotations

import gzip
import shutil
import sys
import tomllib
from pathlib import Path

from .debian import SUITE, Apt
from .kernels import Kernel
from .steps import CHECKOUT, FILES, PROJECT, VENV, Made, digest, in_root, link_tree, make_ext4, run, step

XEN = "4.17"
PACKAGES = f"""
    python3 python3-venv kmod iproute2 util-linux busybox-static procps strace e2fsprogs
    xen-utils-{XEN} xenstore-utils qemu-system-xen qemu-utils fio iperf3 iputils-ping ethtool tcpdump
""".split()
NOT_IN_DOM0 = ("ruff", "mypy")
PYTHON = "3.11"


def root_tree(lines: list[str], lists: Apt) -> Made:
    """The tree of Debian's packages, and of wheels in VENV."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    without = ("doc", "man", "locale", "iso-codes", "qemu/firmware")
    wanted = [one for one in wanted if not one.startswith(NOT_IN_DOM0)]
    constraints = CHECKOUT / "requirements/constraints.txt"

    def make(out: Path) -> None:
        root = out / "root"
        (out / "sources.list").write_text("".join(f"{line}\n" for line in lines if line.startswith("deb ")))
        run(
            "mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}",
            *(f"--dpkgopt=path-exclude=/usr/share/{d}/*" for d in without),
            SUITE, root, out / "sources.list",
        )  # fmt: skip
        # Without the keymaps QEMU ends at once, though it shows nothing; the firmware of whole machines is not needed.
        for path in (root / "usr/share/qemu").iterdir():
            if path.name != "keymaps":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        wheels = root / "wheels"
        wheels.mkdir()
        platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (28, 27, 17)]
        run(
            sys.executable, "-m", "pip", "download", "-q", "--only-binary", ":all:", f"--python-version={PYTHON}",
            "--implementation=cp", *platforms, "--platform=manylinux2014_x86_64",
            "-c", constraints, "-d", wheels, *wanted,
        )  # fmt: skip
        quoted = " ".join(f"'{one}'" for one in wanted)
        in_root(
            root,
            f"python3 -m venv {VENV}; {VENV}/bin/pip install -q --no-index --find-links /wheels {quoted};"
            f" echo {PROJECT} > {VENV}/lib/python{PYTHON}/site-packages/checkout.pth",
        )
        shutil.rmtree(wheels)
        for directory in ("share", "bed", PROJECT[1:], "var/log/xen", "var/lib/xenstored"):
            (root / directory).mkdir(parents=True, exist_ok=True)
        (root / "etc/hostname").write_text("dom0\n")
        (root / "etc/hosts").write_text("127.0.0.1 localhost dom0\n")

    made = step("dom0-root", [lists.key, *PACKAGES, *wanted, constraints, Path(__file__)], make)
    return Made(made / "root", made.key)


def dom0_image(root: Made, kernel: Kernel, guests: dict[str, Made], disk: Made) -> Made:
    """root.ext4 and initrd for dom0. The image has the guests' kernels, initramfs and root disk in /bed."""
    from . import guest

    parts = sorted(path for path in FILES.iterdir() if path.is_file())

    def make(out: Path) -> None:
        tree = out / "tree"
        link_tree(root.path, tree)
        modules = tree / "usr/lib/modules"
        modules.mkdir(parents=True, exist_ok=True)
        shutil.copytree(kernel.made / "lib/modules", modules, dirs_exist_ok=True)
        run("chroot", tree, "depmod", "-a", kernel.version)
        for path in parts:
            shutil.copy(path, tree / "bed")
            (tree / "bed" / path.name).chmod(0o755)
        (tree / "usr/local/bin").mkdir(parents=True, exist_ok=True)
        for name in ("pvdrivers",):
            (tree / "usr/local/bin" / name).symlink_to(f"/bed/{name}")
        for name, made in guests.items():
            shutil.copytree(made.path, tree / "bed/guests" / name)
        shutil.copy(disk / "root.ext4", tree / "bed/guest-root.ext4")
        make_ext4(tree, out / "root.ext4")
        shutil.rmtree(tree)
        small = out / "initrd.tree"
        small.mkdir()
        guest.initrd(small, kernel, guest.DOM0_MODULES, guest._inside(root.path, "/bin/busybox"), out / "initrd")
        shutil.rmtree(small)

    keys = [root.key, kernel.made.key, disk.key, *(made.key for made in guests.values()), digest(*parts)]
    return step("dom0-image", [*keys, *guests, Path(__file__)], make)


def xen(apt: Apt) -> Made:
    """Xen itself, unpacked: QEMU's loader takes it as it is."""

    def make(out: Path) -> None:
        apt.unpack(f"xen-hypervisor-{XEN}-amd64", out / "deb")
        packed = out / f"deb/boot/xen-{XEN}-amd64.gz"
        (out / "xen").write_bytes(gzip.decompress(packed.read_bytes()))
        shutil.rmtree(out / "deb")

    return step("xen", [apt.key, XEN, Path(__file__)], make)
