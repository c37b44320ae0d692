"""Linux PV guests: made by xl, asked by shell lines over their console."""

from __future__ import annotations

import base64
import itertools
import os
import re
import shutil
import termios
import time
import tty
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from .system import RESULTS, CommandError, logs, read, sh, until

BOOT = 120.0
"""Seconds for a guest to boot; it takes four on an idle machine, and a test may have ten at once."""
_numbers = itertools.count(1)


def kernels() -> list[str]:
    """Names of the guest kernels of this bed: debian, and backports where the mirror has it."""
    return sorted(path.name for path in Path("/bed/guests").iterdir())


def listed() -> list[tuple[int, str]]:
    """(domid, name) of what xl lists: a domain whose pages somebody still has is there as "(null)"."""
    lines = [line.split() for line in sh("xl", "list").splitlines()[1:]]
    return [(int(words[1]), words[0]) for words in lines]


def disk(target: str | Path, vdev: str = "xvda", *flags: str, mode: str = "rw", **more: str) -> str:
    """A line of xl's disk list for a disk that `pvdrivers serve` finds: no script, and no look at the target."""
    words = {"format": "raw", "vdev": vdev, "access": mode, "backendtype": "phy", "script": "/bin/true", **more}
    return ",".join([*(f"{key}={value}" for key, value in words.items()), *flags, f"target={target}"])


def vif(bridge: str, number: int = 1, **more: str) -> str:
    """A line of xl's vif list; the last byte of its address is `number`."""
    words = {"mac": f"00:16:3e:00:00:{number:02x}", "bridge": bridge, "script": "/bin/true", **more}
    return ",".join(f"{key}={value}" for key, value in words.items())


class Guest:
    """One guest. A context manager; made on construction, and destroyed on exit whatever its state.

    `disks` are lines of xl's disk list. `root`: boot from that device of the guest ("/dev/xvda"), not from memory.
    `extra`: words for the kernel's command line, module parameters such as xen_blkfront.max_ring_page_order=4
    among them. `config`: more lines of xl's configuration file. `wait`: until it has booted; a `paused` one never does.
    `whole`: a configuration file as it is, and nothing of the above.
    """

    def __init__(
        self,
        *disks: str,
        kernel: str = "debian",
        vcpus: int = 1,
        memory: int = 256,
        root: str = "",
        extra: str = "",
        config: Sequence[str] = (),
        wait: bool = True,
        paused: bool = False,
        whole: Path | None = None,
    ) -> None:
        self.name = f"g{next(_numbers)}"
        boot = Path("/bed/guests") / kernel
        words = f"console=hvc0 quiet loglevel=4 panic=1 mitigations=off random.trust_cpu=on {extra}"
        lines = [
            f"name='{self.name}'", "type='pv'", f"kernel='{boot}/vmlinux'", f"ramdisk='{boot}/initrd'",
            f"memory={memory}", f"vcpus={vcpus}", f"extra='{words}{f' root={root}' if root else ''}'",
            "on_reboot='restart'", "on_crash='destroy'", f"disk={list(disks)!r}", *config,
        ]  # fmt: skip
        if whole is None:
            self.config = Path(f"/tmp/{self.name}.cfg")
            self.config.write_text("\n".join(lines) + "\n")
        else:
            self.config = whole
            self.name = re.findall(r'^name *= *"(.*)"$', whole.read_text(), re.MULTILINE)[0]
        self._log = Path(f"/var/log/xen/console/guest-{self.name}.log")
        logs[f"console of {self.name}"] = self._log
        self._tokens = itertools.count(1)
        self._ready = 0
        self.gone = False
        began = time.monotonic()
        try:
            self.create_output = sh("xl", "create", "-q", *(["-p"] if paused else []), self.config, seconds=BOOT)
            self.created_in = time.monotonic() - began
            if wait and not paused:
                self.wait_ready()
        except BaseException:
            self.destroy()
            raise

    # The life of the domain

    @property
    def domid(self) -> int:
        """Of the running domain; a reboot, a restore and a migration change it. Raises CommandError."""
        return int(sh("xl", "domid", self.name))

    def wait_ready(self, seconds: float = BOOT) -> None:
        """Until the agent has come up once more than when this was last asked."""
        self._ready += 1
        try:
            until(lambda: self.console().count("@@READY ") >= self._ready, seconds, f"{self.name} has booted")
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.console()[-4000:]}\n{sh('xl', 'list', check=False)}") from None

    def reboot(self, seconds: float = BOOT) -> None:
        """In order, as the guest's own reboot command does it."""
        self._send("sync; reboot -f")
        self.wait_ready(seconds)

    def save(self, to: Path) -> None:
        """To a file; the domain is gone then."""
        self.xl("save", to, seconds=BOOT)

    def checkpoint(self, to: Path) -> None:
        """To a file as well; the domain goes on."""
        self.xl("save", to, options=["-c"], seconds=BOOT)

    def restore(self, saved: Path) -> None:
        """Out of the file, as a new domain that goes on where it was."""
        sh("xl", "restore", saved, seconds=BOOT)

    def migrate(self) -> None:
        """To this very host, through a pipe: for a while both domains are there.

        Not by `xl migrate`, which is live: a PV guest has a log of dirty pages only where Xen has shadow paging, and
        Debian's has none (EOPNOTSUPP).
        """
        pipe, config = Path(f"/tmp/{self.name}.pipe"), Path(f"/tmp/{self.name}.incoming.cfg")
        config.write_text(self.config.read_text().replace(f"name='{self.name}'", f"name='{self.name}--incoming'"))
        os.mkfifo(pipe)
        try:
            with ThreadPoolExecutor(1) as pool:
                incoming = pool.submit(sh, "xl", "restore", config, pipe, seconds=2 * BOOT)
                self.save(pipe)
                incoming.result()
        finally:
            pipe.unlink()
        sh("xl", "rename", f"{self.name}--incoming", self.name)

    def destroy(self) -> None:
        """End the domain without asking it, if it is there."""
        if not self.gone:
            sh("xl", "destroy", self.name, check=False)
            self.gone = True

    def xl(
        self, verb: str, *words: str | Path, options: Sequence[str] = (), seconds: float = 60, check: bool = True
    ) -> str:
        """``xl VERB OPTIONS NAME WORDS``: xl takes no option behind the name."""
        return sh("xl", verb, *options, self.name, *words, seconds=seconds, check=check)

    # Talking to it

    def console(self) -> str:
        """All that its console has shown."""
        logs = (self._log, self._log.with_stem(f"{self._log.stem}--incoming"))  # that, while it is on its way here
        return "".join(path.read_text(errors="replace") for path in logs if path.exists())

    def run(self, command: str, seconds: float = 60) -> str:
        """What a shell line printed. Raises CommandError when it fails or takes longer; then the guest is lost."""
        status, output = self.ask(command, seconds)
        if status != 0:
            kernel = self.ask("dmesg | tail -n 12")[1]
            raise CommandError(f"{self.name}: {command}", status, f"{output}\nits kernel: {kernel}")
        return output

    def ask(self, command: str, seconds: float = 60) -> tuple[int, str]:
        """The status and the output of a shell line. Raises CommandError when it does not end."""
        token = self._send(command)
        try:
            found = until(lambda: self._answer(token), seconds, command)
        except AssertionError:
            raise CommandError(f"{self.name}: {command}", None, self.console()[-2000:]) from None
        return found

    def start(self, command: str) -> Job:
        """Run a shell line in the background."""
        return Job(self, command)

    def _answer(self, token: str) -> tuple[int, str] | None:
        m = re.search(rf"@@BEGIN {token}\r?\n(.*?)\r?\n@@END {token} (\d+)", self.console(), re.DOTALL)
        return (int(m.group(2)), m.group(1).replace("\r\n", "\n").strip("\n")) if m else None

    def _send(self, command: str) -> str:
        token = f"{self.name}-{next(self._tokens)}"
        line = f"{token} {base64.b64encode(command.encode()).decode()}\n"
        where = until(lambda: read(f"/local/domain/{self.domid}/console/tty"), 20, f"{self.name} has a console")
        fd = os.open(where, os.O_RDWR | os.O_NOCTTY)
        try:
            tty.setraw(fd, termios.TCSANOW)
            os.write(fd, line.encode())
            termios.tcdrain(fd)
        finally:
            os.close(fd)
        return token

    # Its end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()
        logs.pop(f"console of {self.name}", None)
        if self._log.exists():
            shutil.copy(self._log, RESULTS)


class Job:
    """A shell line in the background of a guest."""

    _numbers = itertools.count(1)

    def __init__(self, guest: Guest, command: str) -> None:
        self._guest, self._command = guest, command
        self._at = f"/tmp/job-{next(self._numbers)}"
        guest.run(f"({{ {command}\n}} > {self._at}.out 2>&1; echo $? > {self._at}.new; mv {self._at}.new {self._at}) &")

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._guest.ask(f"[ -e {self._at} ]")[0] != 0

    def wait(self, seconds: float = 120) -> str:
        """Its output. Raises CommandError when it fails or takes longer."""
        try:
            until(lambda: not self.running(), seconds, self._command, pause=0.3)
        except AssertionError:
            raise CommandError(self._command, None, self._guest.ask(f"cat {self._at}.out")[1]) from None
        output = self._guest.run(f"cat {self._at}.out")
        status = int(self._guest.run(f"cat {self._at}"))
        if status != 0:
            raise CommandError(self._command, status, output)
        return output
