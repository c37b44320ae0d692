"""Boot Xen and dom0 in QEMU, run a script in dom0, bring back its status and the logs."""

from __future__ import annotations

import ctypes
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from .images import Images
from .steps import BedError, cache, say

KEPT = 20  # directories of results


@dataclass
class Machine:
    """What QEMU emulates. Memory in MiB."""

    cpus: int = 2
    memory: int = 6144
    dom0_memory: int = 2560
    xenstored: str = "c"
    xen_words: list[str] = field(default_factory=list)
    dom0_words: list[str] = field(default_factory=list)

    def command(self, images: Images, share: Path) -> list[str]:
        """The QEMU command line. Disks are snapshots: each boot begins with the same images.

        -smap: the software emulation of QEMU 7.2 kills a PV dom0 with it. eager-fpu: with lazy switching of the
        FPU under that emulation, programs in dom0 silently compute wrong results as soon as a guest runs.
        """
        dom0 = f"dom0_mem={self.dom0_memory}M,max:{self.dom0_memory}M"
        xen = [dom0, "com1=115200", "console=com1", "loglvl=warning", "guest_loglvl=warning", "no-real-mode",
               "spec-ctrl=eager-fpu", "bootscrub=off", *self.xen_words]  # fmt: skip
        linux = ["console=hvc0", "quiet", "loglevel=4", "random.trust_cpu=on", "mitigations=off", "net.ifnames=0",
                 "panic=1", "root=/dev/vda", "bed.overlay", "bed.init=/bed/dom0-init",
                 f"bed.xenstored={self.xenstored}", *self.dom0_words]  # fmt: skip
        if any("," in word for word in linux):
            raise BedError(f"QEMU would cut dom0's command line at a comma: {' '.join(linux)}")
        words = "-nodefaults -nographic -no-reboot -serial stdio -nic none".split()
        words += ["-accel", "tcg,thread=multi", "-cpu", "max,-smap"]
        words += ["-smp", str(self.cpus), "-m", str(self.memory)]
        words += ["-kernel", str(images.xen), "-append", " ".join(xen)]
        words += ["-initrd", f"{images.dom0_kernel} {' '.join(linux)},{images.dom0_initrd}"]
        for number, image in enumerate((images.dom0_root, images.project)):
            words += ["-drive", f"file={image},format=raw,if=none,id=disk{number},snapshot=on,cache=unsafe"]
            words += ["-device", f"virtio-blk-pci,drive=disk{number},addr={number + 3}"]
        words += ["-fsdev", f"local,id=share,path={share},security_model=none,multidevs=remap"]
        words += ["-device", "virtio-9p-pci,fsdev=share,mount_tag=share", "-device", "virtio-rng-pci"]
        return ["qemu-system-x86_64", *words]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _results() -> Path:
    """A new directory of results; the oldest ones go."""
    top = cache() / "results"
    top.mkdir(exist_ok=True)
    old = sorted(path for path in top.iterdir() if path.is_dir() and not path.is_symlink())
    for path in old[: -KEPT + 1]:
        shutil.rmtree(path, ignore_errors=True)
    path = top / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    path.mkdir()
    last = top / "last"
    last.unlink(missing_ok=True)
    last.symlink_to(path.name)
    return path


def boot(images: Images, machine: Machine, script: str, seconds: float) -> int:
    """Run a bash script in dom0. Its status; 124 when the time is up, 125 when no status came back."""
    share = _results()
    (share / "run").write_text(script)
    began = time.monotonic()
    with open(share / "console.log", "wb") as log:
        qemu = subprocess.Popen(
            machine.command(images, share), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, preexec_fn=_die_with_parent,
        )  # fmt: skip
        try:
            assert qemu.stdout is not None
            console = Console(qemu.stdout.fileno(), log)
            while qemu.poll() is None and time.monotonic() - began < seconds:
                console.pass_on(timeout=0.5)
            console.pass_on(timeout=0)
            late = qemu.poll() is None
        finally:
            qemu.kill()
            qemu.wait()
    status = share / "results/status"
    if not status.exists():
        end = (share / "console.log").read_text(errors="replace").splitlines()[-30:]
        say("the end of the console:\n" + "\n".join(end))
    say(f"{time.monotonic() - began:.0f} s in QEMU; logs in {share}")
    if late:
        say(f"not finished after {seconds:.0f} s")
        return 124
    return int(status.read_text()) if status.exists() else 125


def failed() -> list[str]:
    """Names of the tests that failed in the last boot; empty if one is not to be tried again (tests/xen/told.py)."""
    log = cache() / "results/last/results/failed"
    lines = [line.split(maxsplit=1) for line in log.read_text().splitlines()] if log.exists() else []
    return [] if any(kind == "final" for kind, _ in lines) else list(dict.fromkeys(name for _, name in lines))


class Console:
    """Copies the serial line to the log, and from dom0's first word on to the terminal."""

    FIRST = b"[dom0 "

    def __init__(self, fd: int, log: IO[bytes]) -> None:
        self._fd, self._log, self._held, self._shown = fd, log, b"", False

    def pass_on(self, timeout: float) -> None:
        """What arrives within a while."""
        while select.select([self._fd], [], [], timeout)[0]:
            data = os.read(self._fd, 65536)
            if not data:
                time.sleep(timeout)
                return
            self._log.write(data)
            self._log.flush()
            if not self._shown:
                self._held += data
                begin = self._held.find(self.FIRST)
                if begin < 0:
                    continue
                data, self._held, self._shown = self._held[begin:], b"", True
            sys.stdout.write(data.replace(b"\r", b"").decode(errors="replace"))
            sys.stdout.flush()
            timeout = 0


def pytest_script(words: list[str]) -> str:
    """The script that runs pytest on the project in dom0."""
    names = [name for name in ("CI", "PVDRIVERS_XEN_KILLS") if name in os.environ]
    passed = "".join(f"export {name}={shlex.quote(os.environ[name])}\n" for name in names)
    return (
        f"{passed}python -m pytest -p no:cacheprovider -p tests.xen.told --color=no --durations=12 --durations-min=3"
        f" --basetemp=/tmp/pytest --hypothesis-profile=ci {shlex.join(words)}\n"
    )
