"""The network of ``pvdrivers demo``: two guests, a process each, that talk to each other by the built-in switch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pvdrivers.bench.agent import Agent, AgentError
from pvdrivers.closing import Closing
from pvdrivers.errors import PvError
from pvdrivers.xl_vif import new_mac

__all__ = ["LINKS", "Talk"]

LINKS = ("tap", "veth")
_MIB = 16
_PORT = 7777
_MOST = 150.0  # seconds beyond those asked for
_DETACH = 5.0
_NAMES = {"tap": "a TAP", "veth": "a veth"}


class Talk(Closing):
    """Two guests that come up in the background; a context manager that takes them down."""

    def __init__(self, run_dir: Path, links: tuple[str, ...] = LINKS) -> None:
        """A backend of the class vif runs, or will. `links`: what the guests try, in this order."""
        from pvdrivers import sim
        from pvdrivers.sim import toolstack

        self._toolstack = toolstack
        self._dom0 = sim.open(run_dir)
        self._backends: list[str] = []
        self._domains: list[Any] = []
        self._agents: list[Agent] = []
        self._said: list[dict[str, Any]] = []
        for i in range(2):
            domain = toolstack.create_domain(self._dom0, name=f"demo-{'ab'[i]}", memory_mib=_MIB)
            self._domains.append(domain)
            keys: dict[str, str | int | bytes] = {"mac": new_mac(), "handle": 0}
            back = {**keys, "bridge": "switch:demo"}
            self._backends.append(toolstack.attach(self._dom0.store, "vif", domain.domid, 0, be=back, fe=keys))
            setup = {"run_dir": str(run_dir), "domid": domain.domid, "token": domain.token.hex(),
                     "address": f"10.0.0.{i + 1}", "links": list(links)}  # fmt: skip
            self._agents.append(Agent("pvdrivers.cli.demo_guest", setup, wait=False))

    def wait(self) -> str:
        """Both are there: a line that says what they are. PvError if one is not."""
        try:
            for agent in self._agents:
                agent.hear()
            self._said = [agent.ask({}) for agent in self._agents]
        except AgentError as e:
            raise PvError(str(e)) from e
        a, b = self._said
        if self.tcp:
            how = f"TCP, each in a network namespace of its own, with {_NAMES[a['link']]}"
        else:
            how = f"packets by netfront's API, as there is no TCP here ({a['why'] or b['why']})"
        return f"two guests: {a['mac']} and {b['mac']}, by the built-in switch: {how}"

    @property
    def tcp(self) -> bool:
        """Whether both have a network stack."""
        return all(said["link"] for said in self._said)

    def start(self, seconds: float) -> None:
        """Have them talk; finish() waits for the end."""
        self._seconds = seconds
        peers = ["10.0.0.2", "10.0.0.1"] if self.tcp else [said["mac"] for said in reversed(self._said)]
        for i, agent in reversed(list(enumerate(self._agents))):
            talk = {"seconds": seconds, "peer": peers[i], "port": _PORT, "first": i == 0, "tcp": self.tcp}
            agent.tell({"talk": talk})

    def finish(self) -> tuple[str, bool]:
        """A line about what has passed, and whether all of it was right. PvError if one has failed."""
        try:
            a, b = [agent.hear(self._seconds + _MOST) for agent in self._agents]
        except AgentError as e:
            raise PvError(str(e)) from e
        right = a["right"] and b["right"] and a["sent"] == b["received"] and b["sent"] == a["received"]
        right &= a["sent"] > 0
        nbytes, seconds = a["received"] + b["received"], max(a["seconds"], b["seconds"])
        what = "by TCP, both ways" if self.tcp else "in packets"
        verdict = "every byte compared" if right else f"NOT what was sent: {a}, {b}"
        rate = f"{nbytes / 1e6:,.1f} MB {what}, {nbytes / seconds / 1e6:,.1f} MB/s"
        return f"the guests have sent each other {rate}: {verdict}", right

    def close(self) -> None:
        """End the guests, take their vifs and domains away."""
        for agent in self._agents:
            if not self._said:
                agent.process.kill()  # it may still wait for a backend that never comes; its domain ends with it
            agent.close()
        try:
            for backend in self._backends:
                self._toolstack.detach(self._dom0.store, backend, timeout=_DETACH, force=True)
            for domain in self._domains:
                self._toolstack.clean(self._dom0.store, domain.domid, domain.uuid)
        except OSError:
            pass  # the embedded Xen has gone, and all of it with it
        finally:
            self._dom0.close()
