"""Two daemons in one dom0, split by guests (`serve --domain`) or by classes (`--class`).

Each serves its own, and is not the other's trouble.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from pvdrivers.cli.stats import snapshot

from .guests import Guest, disk, vif
from .load import verified
from .serve import Serve
from .stores import Stores, checksum
from .system import CommandError, sh, until
from .test_net import ping, up

PREDECESSOR = 5.0
"""Seconds that a process waits for another's claim before it says so."""


def served_by(daemon: Serve) -> dict[str, int]:
    """Which process has which disk; of a dead one there are counters only."""
    return {row["device"]: row["pid"] for row in snapshot(daemon.run_dir) if row.get("connected")}


def test_two_daemons_and_a_guest_each(
    guest: Callable[..., Guest], serve: Callable[..., Serve], stores: Stores
) -> None:
    one, two = guest(), guest()
    names = [f"vbd-{each.domid}-51712" for each in (one, two)]
    first, second = (serve("--domain", str(each.domid)) for each in (one, two))
    images = [stores.file(name, 16, random=True) for name in ("one", "two")]
    for each, image in zip((one, two), images):
        each.xl("block-attach", disk(image))
        each.run("until [ -b /dev/xvda ]; do usleep 100000; done", seconds=30)
        assert each.run("sha256sum < /dev/xvda").split()[0] == checksum(image)
    assert served_by(first) == dict(zip(names, (first.process.pid, second.process.pid)))
    for daemon, other in ((first, names[1]), (second, names[0])):
        assert other not in daemon.log.read_text()

    with verified(one, "xvda") as load, verified(two, "xvda") as neighbour:
        # A third for a guest that has its daemon already: it ends, and says who has the disk.
        words = ("serve", "--run-dir", str(first.run_dir), "--domain", str(two.domid))
        with pytest.raises(CommandError) as refused:
            sh(sys.executable, "-m", "pvdrivers", *words, seconds=180)
        said = refused.value.output
        assert refused.value.status is not None, "it serves nobody, and goes on"
        assert f"{names[1]} is served by another process, pid {second.process.pid} (" in said, said
        assert "or split the guests with --domain" in said and "Traceback" not in said
        load.wait_progress()
        neighbour.wait_progress()

        log = second.log.read_text()
        first.kill()
        for _ in range(3):
            neighbour.wait_progress(seconds=30)
        neighbour.check()
        assert served_by(first).get(names[1]) == second.process.pid
        assert second.log.read_text() == log, "the other daemon has nothing to say of it"

        # One for both takes over the first's, and waits for what the second has.
        both = serve("--domain", str(one.domid), str(two.domid))
        load.wait_progress()
        theirs = f"{names[1]} is served by another process, pid {second.process.pid} ("
        until(lambda: theirs in both.log.read_text(), PREDECESSOR + 15, "it says whose the other one is")
        assert served_by(both) == dict(zip(names, (both.process.pid, second.process.pid)))
        assert second.stop() == 0
        until(lambda: served_by(both).get(names[1]) == both.process.pid, 30, "it has the other one, too")
        neighbour.wait_progress()
        assert both.log.read_text().count(theirs) == 1
    for each, image in zip((one, two), images):
        assert each.run("sha256sum < /dev/xvda").split()[0] == checksum(image)


def test_a_daemon_for_disks_and_one_for_networks(
    guest: Callable[..., Guest], serve: Callable[..., Serve], stores: Stores
) -> None:
    """Each is killed and started again while what the other serves goes on."""
    disks, nets = serve("--class", "vbd"), serve("--class", "vif")
    one = guest(disk(stores.file("one", 16)), config=[f"vif=['{vif('switch:split', 1)}']"])
    two = guest(config=[f"vif=['{vif('switch:split', 2)}']"])
    for number, each in enumerate((one, two), 1):
        up(each, number)
    ping(one, "10.0.0.2", 56)
    pids = {row["device"]: row["pid"] for row in snapshot(disks.run_dir)}
    assert pids[f"vbd-{one.domid}-51712"] == disks.process.pid
    assert {pids[f"vif-{each.domid}-0"] for each in (one, two)} == {nets.process.pid}
    with verified(one, "xvda") as load:
        log = disks.log.read_text()
        nets.kill()
        for _ in range(3):
            load.wait_progress(seconds=30)
        assert disks.log.read_text() == log, "the disks' daemon has nothing to say of it"
        nets.start()
        ping(one, "10.0.0.2", 56, 9000)
        log = nets.log.read_text()
        disks.kill()
        ping(one, "10.0.0.2", 56, 9000)
        assert nets.log.read_text() == log
        disks.start()
        load.wait_progress()
