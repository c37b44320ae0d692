"""A daemon with a neighbour: a guest under fio with verify, that is to notice nothing of what befalls the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pvdrivers.cli.stats import snapshot

from .guests import Guest, disk, listed
from .load import Load
from .relay import Relay
from .serve import Serve
from .stores import Stores
from .system import listing, until

BACKENDS = "/local/domain/0/backend/vbd"


class Yard:
    """One daemon, whose connection to xenstored goes through a relay, and the neighbour."""

    def __init__(self, serve: Serve, relay: Relay, neighbour: Guest, load: Load) -> None:
        self.serve, self.relay, self.neighbour, self.load = serve, relay, neighbour, load

    def devices(self, domid: int) -> list[dict[str, Any]]:
        """What `pvdrivers stats` tells of a domain's."""
        return [one for one in snapshot(self.serve.run_dir) if one["device"].startswith(f"vbd-{domid}-")]

    def log(self) -> str:
        """All that the daemon has said."""
        return self.serve.log.read_text()

    def check_gone(self, domid: int) -> None:
        """Nothing is left of a domain: not in Xen, whose pages we would hold, not in the store, not with us."""
        until(lambda: domid not in dict(listed()), 10, f"domain {domid} is gone from xl list")
        until(lambda: not self.devices(domid), 10, f"the daemon has let go of domain {domid}")
        until(lambda: str(domid) not in listing(BACKENDS), 5, f"no backend directory of domain {domid}")
        assert "(null)" not in dict(listed()).values(), listed()

    def check_unnoticed(self) -> None:
        """The neighbour goes on, and has seen no error; the daemon has had none of its own."""
        assert self.serve.alive(), self.log()[-4000:]
        self.load.wait_progress()
        self.load.check()
        assert "Traceback" not in self.log() and "our own fault" not in self.log(), self.log()[-6000:]


@contextmanager
def yard(top: Path) -> Iterator[Yard]:
    """One for the tests of a file; in the end the neighbour's load is to have found nothing wrong."""
    with ExitStack() as stack:
        stores = stack.enter_context(Stores(top))
        relay = stack.enter_context(Relay(top / "xenstored"))
        serve = stack.enter_context(Serve(XENSTORED_PATH=str(relay.path)))
        neighbour = stack.enter_context(Guest(disk(stores.file("neighbour", 16))))
        load = Load(neighbour, "xvda", depth=4, mib=1, iops=40)
        made = Yard(serve, relay, neighbour, load)
        yield made
        made.check_unnoticed()
        assert load.stop() >= 1  # rounds, each read back: few on a slow machine
        domid = neighbour.domid
        neighbour.destroy()
        made.check_gone(domid)
