"""xenstored ends, and another one starts that knows nothing: of no guest, no watch, no device.

The last test of a boot (see told.py), as the kernel of dom0 does not set its watches anew: its own backends hear of
nothing from here on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from pvdrivers.cli.stats import snapshot

from .guests import Guest, disk
from .load import Load
from .serve import Serve
from .stores import Stores, checksum
from .system import listing, read, sh, until, write

LAST = True
"""Of all tests of the boot."""


def end(name: str) -> None:
    """A daemon of dom0's, by its process id."""
    pid = int(sh("pidof", name))
    os.kill(pid, signal.SIGKILL)
    until(lambda: not os.path.exists(f"/proc/{pid}"), 10, f"{name} has ended")


def begin_anew(kept: dict[str, str]) -> None:
    """As at boot: an empty store, which is told of dom0. Then what xenconsoled needs of a guest that is there."""
    sh("xenstored", "--pid-file", "/run/xen/xenstored.pid")
    until(lambda: listing("/"), 20, "xenstored answers")
    sh("xen-init-dom0")
    write(**kept)
    sh("xenconsoled", "--pid-file=/run/xen/xenconsoled.pid", "--log=guest", "--log-dir=/var/log/xen/console")


def test_xenstored_is_restarted_and_knows_nothing(
    serve: Callable[..., Serve], guest: Callable[..., Guest], stores: Stores
) -> None:
    """The disk that is in use is served on, and its guest sees no error; a guest that comes then is served as well. An
    upgrade is refused: nobody could find the first disk again."""
    daemon = serve()
    one = guest(disk(stores.file("disk", 16)))
    load = Load(one, "xvda", depth=4, mib=1, iops=40)
    name, home = f"vbd-{one.domid}-51712", f"/local/domain/{one.domid}"
    kept = {f"{home}/name": one.name}
    for key in listing(f"{home}/console"):
        if key != "tty":
            kept[f"{home}/console/{key}"] = read(f"{home}/console/{key}") or ""

    def answered() -> int:
        rows = [row for row in snapshot(daemon.run_dir) if row["device"] == name and row["connected"]]
        return sum(sum(queue["requests"].values()) for row in rows for queue in row["queues"])

    end("xenstored")
    seen = answered()
    until(lambda: answered() > seen + 50, 60, "its disk is served while there is no xenstored")
    end("xenconsoled")
    begin_anew(kept)
    text = f"{name}: xenstore was restarted, and knows neither it nor its guest; it is served as before"
    until(lambda: text in daemon.log.read_text(), 60, "the daemon has found out")
    until(lambda: read(f"{home}/console/tty"), 20, "its console is back")
    load.wait_progress()
    load.check()

    image = stores.file("next", 16, random=True)
    two = guest(disk(image))
    assert two.run("sha256sum < /dev/xvda").split()[0] == checksum(image)
    two.destroy()
    said = sh(sys.executable, "-m", "pvdrivers", "upgrade", "--run-dir", daemon.run_dir, seconds=300, check=False)
    assert "xenstore was restarted and has forgotten" in said and name in said, said
    assert daemon.alive()
    load.wait_progress()
    load.check()
    assert load.stop() >= 1
    log = daemon.log.read_text()
    assert log.count(text) == 1 and "Traceback" not in log and "our own fault" not in log, log[-4000:]
