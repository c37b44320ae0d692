"""Boot Xen and dom0 in QEMU, run a script in dom0, bring back its status and the logs.

Several machines may run the same script beside each other. They share a directory, and so can share out the work.
"""

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
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from .images import Images
from .steps import BedError, cache, say

KEPT = 20  # directories of results


@dataclass
class Machine:
    """What QEMU emulates. Memory in MiB."""

    cpus: int
    memory: int = 6144
    dom0_memory: int = 2560
    xenstored: str = "c"
    xen_words: list[str] = field(default_factory=list)
    dom0_words: list[str] = field(default_factory=list)

    def command(self, images: Images, share: Path, results: str) -> list[str]:
        """The QEMU command line. Disks are snapshots: each boot begins with the same images.

        -smap: the software emulation of QEMU 7.2 kills a PV dom0 with it. eager-fpu: with lazy switching of the
        FPU under that emulation, programs in dom0 silently compute wrong results as soon as a guest runs.
        """
        dom0 = f"dom0_mem={self.dom0_memory}M,max:{self.dom0_memory}M"
        xen = [dom0, "com1=115200", "console=com1", "loglvl=warning", "guest_loglvl=warning", "no-real-mode",
               "spec-ctrl=eager-fpu", "bootscrub=off", *self.xen_words]  # fmt: skip
        linux = ["console=hvc0", "quiet", "loglevel=4", "random.trust_cpu=on", "mitigations=off", "net.ifnames=0",
                 "panic=1", "root=/dev/vda", "bed.overlay", "bed.init=/bed/dom0-init",
                 f"bed.xenstored={self.xenstored}", f"bed.results={results}", *self.dom0_words]  # fmt: skip
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


def fitting(wanted: int, memory: int) -> int:
    """As many machines of `memory` MiB as there is room for. QEMU takes a gigabyte more for what it has translated."""
    each = memory + 1024
    said = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(said["MemAvailable"].split()[0]) >> 10
    fit = max(1, min(wanted, free // each))
    if fit < wanted:
        say(f"{fit} machine(s) and not {wanted}: {free} MiB of memory are free, and each takes {each}")
    return fit


def processors(machines: int) -> int:
    """Of each. If all together had more than the host has, one would wait for locks whose holder does not run just
    then: a guest takes a hundred seconds to boot in such a machine, and six in one that has a single processor."""
    return max(1, min(2, len(os.sched_getaffinity(0)) // machines))


def boot(images: Images, machine: Machine, script: str, seconds: float, machines: int = 1) -> int:
    """Run a bash script in dom0. The worst status; 124 when the time is up, 125 when no status came back."""
    share = _results()
    (share / "run").write_text(script)
    began = time.monotonic()
    with ExitStack() as stack:
        running = [
            stack.enter_context(closing(Running(images, machine, share, number, machines > 1)))
            for number in range(1, machines + 1)
        ]
        while (alive := [one for one in running if one.alive()]) and time.monotonic() - began < seconds:
            ready, _, _ = select.select([one.fd for one in alive], [], [], 0.5)
            for one in alive:
                if one.fd in ready:
                    one.pass_on()
    say(f"{time.monotonic() - began:.0f} s in QEMU; logs in {share}")
    statuses = [one.status() for one in running]
    if alive:
        say(f"not finished after {seconds:.0f} s")
        return 124
    return max(statuses)


def failed() -> list[str]:
    """Names of the tests that failed in the last boot; empty if one is not to be tried again (tests/xen/told.py)."""
    logs = (cache() / "results/last").glob("results*/failed")
    lines = [line.split(maxsplit=1) for log in logs for line in log.read_text().splitlines()]
    return [] if any(kind == "final" for kind, _ in lines) else list(dict.fromkeys(name for _, name in lines))


class Running:
    """One of the machines. Its serial line goes to a log, and from dom0's first word on to the terminal."""

    FIRST = b"[dom0 "

    def __init__(self, images: Images, machine: Machine, share: Path, number: int, one_of_several: bool) -> None:
        results, console = ("results", "console.log") if number == 1 else (f"results-{number}", f"console-{number}.log")
        self._results, self._console = share / results, share / console
        self._log = open(self._console, "wb")  # noqa: SIM115 - closed with the machine
        self._prefix = f"{number}| ".encode() if one_of_several else b""
        self._held, self._shown = b"", False
        self._qemu = subprocess.Popen(
            machine.command(images, share, results), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, preexec_fn=_die_with_parent,
        )  # fmt: skip
        assert self._qemu.stdout is not None
        self.fd = self._qemu.stdout.fileno()
        self._ended = False

    def alive(self) -> bool:
        """Whether more may come from it."""
        return not self._ended

    def pass_on(self) -> None:
        """What has arrived; of several machines in whole lines, each with the machine's number."""
        data = os.read(self.fd, 65536)
        self._ended = not data
        self._log.write(data)
        self._log.flush()
        self._held += data.replace(b"\r", b"")
        if not self._shown:
            begin = self._held.find(self.FIRST)
            if begin < 0:
                return
            self._held, self._shown = self._held[begin:], True
        end = len(self._held) if self._ended or not self._prefix else self._held.rfind(b"\n") + 1
        text, self._held = self._held[:end], self._held[end:]
        for line in text.splitlines(keepends=True):
            sys.stdout.write((self._prefix + line).decode(errors="replace"))
        sys.stdout.flush()

    def status(self) -> int:
        """What the script ended with, or 125."""
        said = self._results / "status"
        if said.exists():
            return int(said.read_text())
        end = self._console.read_text(errors="replace").splitlines()[-30:]
        say("no status came back; the end of the console:\n" + "\n".join(end))
        return 125

    def close(self) -> None:
        """End it, if it has not ended of itself."""
        self._qemu.kill()
        self._qemu.wait()
        self._log.close()


def pytest_script(words: list[str]) -> str:
    """The script that runs pytest on the project in dom0."""
    names = [name for name in ("CI", "PVDRIVERS_XEN_KILLS", "PVDRIVERS_XEN_BEGIN") if name in os.environ]
    passed = "".join(f"export {name}={shlex.quote(os.environ[name])}\n" for name in names)
    return (
        f"{passed}python -m pytest -p no:cacheprovider -p tests.xen.told --color=no --durations=12 --durations-min=3"
        f" --basetemp=/tmp/pytest --hypothesis-profile=ci {shlex.join(words)}\n"
    )
