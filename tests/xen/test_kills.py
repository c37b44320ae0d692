"""The daemon killed, ended and stopped, again and again, under fio with verify in a guest: a pause, and no error.

How long the pauses were is printed, and kept in the results (pauses.md). Under emulation they are many times those of a
real machine: nearly all of each is the start of a Python program.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pvdrivers.cli.stats import snapshot
from pvdrivers.worker.journal import STEPS

from .guests import Guest, disk
from .load import PATIENCE, Load, verified
from .serve import Serve
from .stores import Stores, checksum
from .system import RESULTS, until

KILLS = int(os.environ.get("PVDRIVERS_XEN_KILLS", "20"))
POLICIES = {"xvda": "map", "xvdb": "copy", "xvdc": "persistent"}
DISKS = tuple(POLICIES)
MIB = 16


@dataclass
class Pause:
    """Seconds from a daemon's end: until the next one was ready, and until the guest had an answer."""

    how: str
    in_flight: int
    replayed: int
    ready: float
    guest: float


class Host:
    """A daemon, a guest with a disk of each policy, and what it went through."""

    def __init__(self, serve: Serve, guest: Guest, images: dict[str, Path]) -> None:
        self.serve, self.guest, self.images = serve, guest, images

    def restart(self, load: Load, how: str, end: Callable[[], object], **environment: str) -> Pause:
        """End the daemon by `end`, and start another at once, with `environment`."""
        end()
        began = time.monotonic()
        in_flight = self.in_flight()
        answered: list[float] = []

        def wait() -> None:
            load.wait_progress(of_any=True)
            answered.append(time.monotonic() - began)

        waiter = threading.Thread(target=wait)
        waiter.start()
        try:
            self.serve.environment = environment
            self.serve.start()
        finally:
            ready = time.monotonic() - began
            waiter.join()
        assert answered, f"no answer to the guest after {how}\n{self.serve.log.read_text()[-3000:]}"
        return Pause(how, in_flight, self.replayed(), ready, answered[0])

    def replayed(self) -> int:
        """How many requests the daemon has executed again, when it has taken over all disks."""

        def found() -> list[int]:
            devices = snapshot(self.serve.run_dir)
            theirs = [device for device in devices if device["pid"] == self.serve.process.pid]
            return [queue["replayed"] for device in theirs for queue in device["queues"]]

        until(lambda: len(found()) == len(DISKS), PATIENCE, "all disks are taken over")
        return sum(found())

    def in_flight(self) -> int:
        """How many requests the journals have."""
        return sum(len(device["inflight"]) for device in snapshot(self.serve.run_dir))

    def kill(self, chance: random.Random) -> None:
        """SIGKILL, at a moment that has requests in flight if there is one in a while."""
        for _ in range(40):
            time.sleep(chance.uniform(0.0, 0.3))
            self.serve.process.send_signal(signal.SIGSTOP)
            if self.in_flight():
                break
            self.serve.process.send_signal(signal.SIGCONT)
        self.serve.kill()

    def check_content(self) -> None:
        """What the guest reads is what the image has."""
        for name, image in self.images.items():
            assert self.guest.run(f"sha256sum < /dev/{name}").split()[0] == checksum(image), name


@pytest.fixture(scope="module")
def module_host(
    module_serve: Callable[..., Serve], module_guest: Callable[..., Guest], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    with Stores(tmp_path_factory.mktemp("disks")) as stores:
        images = {name: stores.file(name, MIB) for name in DISKS}
        serve = module_serve()
        guest = module_guest(*(disk(f"{images[name]},policy={POLICIES[name]}", name) for name in DISKS))
        found = {device["policy"] for device in snapshot(serve.run_dir)}
        assert found == set(POLICIES.values())
        yield Host(serve, guest, images)
        guest.destroy()


@pytest.fixture
def host(module_host: Host) -> Host:
    """With a daemon that runs, whatever a test before has left."""
    if not module_host.serve.alive():
        module_host.serve.start()
    return module_host


def told(capsys: pytest.CaptureFixture[str], what: str, pauses: list[Pause]) -> None:
    """On the terminal, and for the results."""
    rows = [f"| {p.how} | {p.in_flight} | {p.replayed} | {p.ready:.1f} | {p.guest:.1f} |" for p in pauses]
    times = sorted(p.guest for p in pauses)
    text = (
        f"## {what}\n\n| ended | in flight | executed again | until ready, s | until the next answer, s |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows) + f"\n\nPauses of the guest: median"
        f" {statistics.median(times):.1f} s, {times[0]:.1f} to {times[-1]:.1f} s, all under emulation.\n"
    )
    with (RESULTS / "pauses.md").open("a") as out:
        out.write(f"{text}\n")
    with capsys.disabled():
        print(f"\n{text}")


@pytest.mark.xen_quick
def test_killed_twice(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    killed(host, 2, capsys)


def test_killed_again_and_again(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """Every other time at a step of the journal, some way into the load: around an answer is where it matters."""
    killed(host, KILLS, capsys)


def killed(host: Host, kills: int, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(kills)
    steps = itertools.cycle(chance.sample(list(STEPS), len(STEPS)))
    step = 0
    pauses = []
    with verified(host.guest, *DISKS) as load:
        for number in range(kills):
            if step:
                how, end = f"killed at step {step}, {STEPS[step]}", lambda: died(host.serve)
            else:
                how, end = "killed", lambda: host.kill(chance)
                load.wait_progress()
            # Every other one is started so that it will die of itself, when it has been ready for a while.
            step = next(steps) if number % 2 == 0 and number < kills - 1 else 0
            more = {"PVDRIVERS_TEST_KILL": f"{step}:{chance.randrange(400, 600)}"} if step else {}
            pauses.append(host.restart(load, how, end, **more))
    told(capsys, f"Killed {kills} times", pauses)
    host.check_content()
    assert any(p.in_flight for p in pauses), "nothing was in flight"
    assert any(p.replayed for p in pauses), "no request was executed again"


def died(serve: Serve) -> None:
    """Of itself."""
    try:
        until(lambda: not serve.alive(), PATIENCE, "the daemon has reached the step")
    except AssertionError as e:
        raise AssertionError(f"{e}\n{snapshot(serve.run_dir)}") from None
    assert serve.process.returncode == -signal.SIGKILL
    serve.kill()


def test_ended_in_order_under_io(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM: what is in flight is finished first, so the next one has nothing to do again."""
    pauses = []
    with verified(host.guest, *DISKS) as load:
        for _ in range(2):
            pauses.append(host.restart(load, "SIGTERM", lambda: ended(host.serve)))
    told(capsys, "Ended in order", pauses)
    assert [(p.in_flight, p.replayed) for p in pauses] == [(0, 0)] * 2


def ended(serve: Serve) -> None:
    assert serve.stop() == 0


def test_stopped_for_a_while(host: Host) -> None:
    """SIGSTOP and SIGCONT, as a debugger or a machine that swaps does it: the guest waits."""
    with verified(host.guest, *DISKS) as load:
        for _ in range(2):
            host.serve.process.send_signal(signal.SIGSTOP)
            time.sleep(3)
            host.serve.process.send_signal(signal.SIGCONT)
            load.wait_progress()
    host.check_content()
