"""Debian packages, from the mirrors that this machine's own apt is set up with; its apt is left as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .steps import BedError, Made, cache, run, say, step

SUITE = "bookworm"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
HOST = {
    "qemu-system-x86": "qemu-system-x86_64",
    "mmdebstrap": "mmdebstrap",
    "e2fsprogs": "mkfs.ext4",
    "dpkg-dev": "dpkg-source",
    "gcc": "gcc",
    "libc6-dev": "/usr/lib/x86_64-linux-gnu/libc.a",
    "make": "make",
    "binutils": "objcopy",
    "cpio": "cpio",
    "xz-utils": "xz",
    "debian-archive-keyring": KEYRING,
}
"""What the host needs: package, and a program or file by which it is found."""


def missing() -> list[str]:
    """The packages of HOST that are not there."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    return [p for p, sign in HOST.items() if not (os.path.exists(sign) if "/" in sign else shutil.which(sign))]


def install_missing() -> None:
    """Install what is missing, as root on a Debian. Raises BedError with the command to type otherwise."""
    if os.uname().machine != "x86_64":
        raise BedError(f"the bed boots x86_64 only; this machine is {os.uname().machine}")
    lacking = missing()
    if os.geteuid() != 0:
        first = f"sudo apt-get install -y --no-install-recommends {' '.join(lacking)}; then " if lacking else ""
        raise BedError(f"building the images needs root (chroot, mount). Type: {first}sudo make test-xen")
    if not lacking:
        return
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *lacking]
    if not shutil.which("apt-get"):
        raise BedError(f"these Debian packages are missing, and this is no Debian: {' '.join(lacking)}")
    say(f"installing {' '.join(lacking)}")
    try:
        run(*command)
    except BedError:
        run("apt-get", "update", "-q")
        run(*command)


def sources() -> list[str]:
    """Lines for apt: the release with its updates, and security; deb and deb-src."""
    targets = run("apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", quiet=False)
    where = dict(reversed(line.split()) for line in targets.splitlines() if len(line.split()) == 2)
    if SUITE not in where:
        raise BedError(f"this machine's apt knows no Debian {SUITE}; the bed is made of its packages (apt-get update?)")
    suites = {name: uri for name, uri in where.items() if name in (SUITE, f"{SUITE}-updates", f"{SUITE}-security")}
    signed = f"[signed-by={KEYRING}]"
    return [f"{kind} {signed} {uri} {name} main" for kind in ("deb", "deb-src") for name, uri in sorted(suites.items())]


def backports(lines: list[str]) -> str:
    """The line for the newer packages, which the mirror may have or not."""
    base = next(line for line in lines if line.startswith("deb ") and f" {SUITE} main" in line)
    return base.replace(f" {SUITE} main", f" {SUITE}-backports main")


class Apt:
    """An apt with lists of its own."""

    def __init__(self, made: Made) -> None:
        self.key = made.key
        self._env = {"APT_CONFIG": str(made / "apt.conf")}

    def __call__(self, *words: str, cwd: Path | None = None) -> str:
        return run(*words, cwd=cwd, env=self._env)

    def depends(self, package: str) -> str:
        """The first package that a package of no content depends on: linux-image-amd64's kernel."""
        text = self("apt-cache", "depends", package)
        return next(line.split()[-1] for line in text.splitlines() if "Depends:" in line)

    def unpack(self, package: str, into: Path) -> None:
        """Download one package and unpack it, without installing it."""
        debs = into.parent / "debs"
        debs.mkdir()
        self("apt-get", "-q", "download", package, cwd=debs)
        run("dpkg-deb", "-x", *debs.glob("*.deb"), into)
        shutil.rmtree(debs)


def apt(name: str, lines: list[str]) -> Apt | None:
    """An apt that knows `lines`; None where the mirror does not have them."""

    def make(out: Path) -> None:
        where = out.parent / name
        for directory in ("lists/partial", "cache/archives/partial"):
            (out / directory).mkdir(parents=True)
        (out / "sources.list").write_text("\n".join(lines) + "\n")
        conf = {"Dir::Etc::sourcelist": f"{where}/sources.list", "Dir::Etc::sourceparts": "/dev/null",
                "Dir::Etc::preferencesparts": "/dev/null", "Dir::State::lists": f"{where}/lists",
                "Dir::Cache": f"{where}/cache", "APT::Sandbox::User": "root"}  # fmt: skip
        (out / "apt.conf").write_text("".join(f'{key} "{value}";\n' for key, value in conf.items()))
        here = "".join(f'{key} "{value.replace(str(where), str(out))}";\n' for key, value in conf.items())
        (out / "update.conf").write_text(here)
        done = subprocess.run(
            ["apt-get", "-q", "update", "-o", "APT::Update::Error-Mode=any"],
            env={**os.environ, "APT_CONFIG": str(out / "update.conf")},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise BedError(f"apt-get update: {done.stdout[-1000:]}")

    return Apt(step(name, [*lines, str(cache()), Path(__file__)], make))
