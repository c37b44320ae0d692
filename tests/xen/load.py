"""fio with verify in a guest, round after round, for as long as a test takes; and how long it stood still."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .guests import Guest

SIZES = "512/5:4k/45:12k/20:64k/20:128k/10"
"""Of the requests, each with its share in percent: a segment or less, some, and more than fit in without indirect."""
PATIENCE = 240.0
"""Seconds without an answer: a daemon starts in that time, on a machine that has other things to do as well."""
_numbers = itertools.count(1)
_DISK = re.compile(r"\bxvd[a-z]+")


class Load:
    """One fio a disk of a guest, each begun again when it has written and verified `mib` MiB, until stop().

    A round with an error or a wrong byte is the last one, and stop() and check() tell it.
    """

    def __init__(self, guest: Guest, *devices: str, depth: int = 16, mib: int = 4, iops: int = 0) -> None:
        """`devices` are names in the guest (xvda); each is written to from its beginning on. `iops`: no more.

        It rests now and then: a daemon that starts beside a busy guest takes minutes for it under emulation.
        """
        self.guest, self.devices = guest, devices
        self._stop = f"/tmp/stop-{next(_numbers)}"
        fio = (
            f"fio --ioengine=io_uring --direct=1 --rw=randwrite --bssplit={SIZES} --iodepth={depth} --size={mib}m"
            " --verify=crc32c --verify_fatal=1 --verify_backlog=64 --verify_dump=0 --do_verify=1"
            f" {f'--rate_iops={iops}' if iops else '--thinktime=100000 --thinktime_blocks=48'}"
        )
        self._jobs = [
            guest.start(
                f"n=0; until [ -e {self._stop} ]; do n=$((n + 1)); "
                f"{fio} --randseed=$n --name={device} --filename=/dev/{device} > {self._stop}.{device} 2>&1 ||"
                f" {{ cat {self._stop}.{device}; exit 1; }}; done; echo $n rounds"
            )
            for device in devices
        ]
        self.wait_progress()

    def wait_progress(self, *, of_any: bool = False, seconds: float = PATIENCE) -> None:
        """Until requests of each disk, or of any, have been answered that were not yet when this was asked.

        Raises CommandError when they are not.
        """
        names = " ".join(self.devices)
        answers = 1 if of_any else len(self.devices)
        self.guest.run(
            f"for d in {names}; do read -r r x x x w x < /sys/block/$d/stat; eval was_$d=$((r + w)); done\n"
            f"answers=0\n"
            f"while [ $answers -lt {answers} ]; do\n usleep 100000; answers=0\n"
            f" for d in {names}; do\n"
            "  read -r r x x x w x < /sys/block/$d/stat; eval was=\\$was_$d\n"
            "  [ $((r + w)) -eq $was ] || answers=$((answers + 1))\n done\ndone",
            seconds,
        )

    def check(self) -> None:
        """Raises AssertionError if one has ended, which it does only with an error."""
        for job in self._jobs:
            assert job.running(), job.wait(5)

    def stop(self, seconds: float = 120) -> int:
        """Let them finish their rounds; how many there were. Raises CommandError for an error or a wrong byte."""
        self.guest.run(f"touch {self._stop}")
        rounds = sum(int(job.wait(seconds).split()[-2]) for job in self._jobs)
        errors = self.errors()
        assert not errors, f"{self.guest.name} has seen errors:\n{errors}"
        return rounds

    def errors(self) -> str:
        """What the guest's kernel has said of errors, but of those of other disks."""
        said = self.guest.ask("dmesg | grep -i -E 'i/o error|buffer i/o|xvd.*(error|timed? ?out)'")[1]
        return "\n".join(line for line in said.splitlines() if set(_DISK.findall(line)) <= set(self.devices))


@contextmanager
def verified(guest: Guest, *devices: str, depth: int = 16, mib: int = 4) -> Iterator[Load]:
    """A load that is to run on through all that happens within, and to find nothing wrong."""
    load = Load(guest, *devices, depth=depth, mib=mib)
    yield load
    load.wait_progress()
    load.check()
    assert load.stop() >= len(devices)
