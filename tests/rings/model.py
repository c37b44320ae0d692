"""An exhaustive model checker whose model is rings/ring.py itself.

The source of the ring is read as text, and every kernel in it is turned into a generator that stops at each access
to shared memory. Two processes, a front end and a back end, then run in every possible order of these accesses;
and not only that, for a store first goes into a buffer of its processor and reaches memory at any later time
(x86-TSO; with `order="pso"` stores to different words also overtake each other, unless one is a release). A fence
waits until the buffer is empty. So a barrier that is missing is found, as it would not be by any test on one machine.

Not modelled: loads that are done early (the acquire loads are needed for that, and trusted).

A mutant is the same source with some text replaced. `explore` raises Violation, with the way that led there, for
a wake-up that is lost (nobody can go on, and not all is done), a message that is not the expected one (overrun or
disorder), a ring believed corrupt, or a notification that nobody asked for.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np

import rings.ring
from rings.ring import CORRUPT, RING_END

SOURCE = Path(rings.ring.__file__).read_text()
FRONT, BACK = 0, 1
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = 0, 4, 8, 12  # addresses of the header; slots follow at 64
SLOTS, OUTBOX, INBOX = 64, 1 << 20, 1 << 21

Action = tuple[Any, ...]
Steps = Generator[Action, Any, Any]


class Violation(AssertionError):
    """The protocol fails, and this is how."""


# What the kernels call, as accesses.


def load(address: int) -> Steps:
    return (yield ("load", address))


def store_plain(address: int, value: Any) -> Steps:
    yield ("store", address, int(value), False)


def store_releasing(address: int, value: Any) -> Steps:
    yield ("store", address, int(value), True)


def fence() -> Steps:
    yield ("fence",)


class Copies:
    """Copies of whole messages: one access for each, between a slot and private memory."""

    def __init__(self) -> None:
        self.private: dict[int, Any] = {}

    def copy(self, to: int, source: int, size: int) -> Steps:
        if to < OUTBOX:
            yield ("store", to, self.private[source], False)
        else:
            self.private[to] = yield ("load", source)


class ToGenerators(ast.NodeTransformer):
    """Kernels become generators: calls of what stops, or may stop, become ``yield from``."""

    def __init__(self, stopping: set[str]) -> None:
        self.stopping = stopping

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list = []
        self.generic_visit(node)
        # Also those without an access are generators, so that all can be called alike.
        node.body.insert(0, ast.parse("if False: yield").body[0])
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in self.stopping:
            return ast.YieldFrom(node)
        return node


STOPPING = set("load_acquire32 load_once32 store_once32 store_release32 full_barrier copy_bytes copy_in".split())


@functools.lru_cache
def compiled(source: str) -> tuple[tuple[str, ...], CodeType]:
    """The kernels in a source text: their names, and their code as generators."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id in ("inline", "kernel") for d in node.decorator_list)
    ]
    names = tuple(node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    new = ast.fix_missing_locations(ToGenerators(STOPPING | set(names)).visit(tree))
    return names, compile(new, "ring.py", "exec")


def kernels(source: str) -> tuple[dict[str, Callable[..., Steps]], Copies]:
    """The functions of ring.py as generators, and the private memory that they copy to and from."""
    copies = Copies()
    names, code = compiled(source)
    scope: dict[str, Any] = {
        "load_acquire32": load,
        "load_once32": load,
        "store_once32": store_plain,
        "store_release32": store_releasing,
        "full_barrier": fence,
        "copy_bytes": copies.copy,
        "copy_in": copies.copy,
        "compiler_barrier": lambda: None,
        "distance": lambda a, b: (a - b) % 2**32,
        "signed_distance": lambda a, b: (a - b + 2**31) % 2**32 - 2**31,
        "records": lambda end, n, dtype: [end],
        "np": np,
        "RING_END": RING_END,
        "CORRUPT": CORRUPT,
    }
    exec(code, scope)
    return {name: scope[name] for name in names}, copies


@dataclass(frozen=True)
class World:
    """What is explored: how many slots and messages, where indices begin, and which source."""

    nr_ents: int = 1
    messages: int = 2
    start: int = 2**32 - 1
    order: str = "tso"
    choices: bool = False
    """Also try every number of messages for a batch, not only the largest."""
    source: str = SOURCE

    def end(self, side: int) -> dict[str, Any]:
        """A RING_END, as front_end and back_end fill it in."""
        own, peer = (REQ_PROD, RSP_PROD) if side == FRONT else (RSP_PROD, REQ_PROD)
        end: dict[str, Any] = dict.fromkeys(RING_END.names or (), 0)
        end |= {"slots": SLOTS, "prod": own, "prod_event": own + 4, "peer_prod": peer, "peer_event": peer + 4}
        end |= {"nr_ents": self.nr_ents, "entry_size": 1, "credit": self.nr_ents if side == BACK else 0}
        return end | {"prod_pvt": self.start, "pushed": self.start, "cons": self.start}

    def memory(self) -> dict[int, Any]:
        """The shared page, formatted."""
        memory: dict[int, Any] = dict.fromkeys(range(SLOTS, SLOTS + self.nr_ents))
        event = (self.start + 1) % 2**32
        return memory | {REQ_PROD: self.start, REQ_EVENT: event, RSP_PROD: self.start, RSP_EVENT: event}


def program(world: World, side: int) -> tuple[Steps, dict[str, Any], dict[int, Any]]:
    """One process, its ring end and its private memory."""
    ring, copies = kernels(world.source)
    end = world.end(side)
    return (front if side == FRONT else back)(world, ring, end, copies.private), end, copies.private


def batch(world: World, most: int) -> Steps:
    if world.choices and most > 1:
        return (yield ("choose", most))
    return most


def receive(
    world: World, ring: dict[str, Any], end: dict[str, Any], private: dict[int, Any], kind: str, done: int
) -> Steps:
    """Take what is there, or sleep until woken. The number of messages taken; 0 after a sleep, too."""
    limit = yield from batch(world, world.nr_ents)
    n = yield from ring["take"](end, INBOX, 1, limit)
    if n == 0:
        n = yield from ring["final_check"](end)
        if n == 0:
            yield ("wait",)
        if n != CORRUPT:
            return 0
    if n == CORRUPT:
        yield ("fail", "an honest peer's index is refused")
    for i in range(n):
        if private[INBOX + i] != (kind, done + i):
            yield ("fail", f"read {private[INBOX + i]} for {(kind, done + i)}")
    private.clear()
    return n


def send(ring: dict[str, Any], end: dict[str, Any], private: dict[int, Any], kind: str, first: int, n: int) -> Steps:
    for i in range(n):
        private[OUTBOX] = (kind, first + i)
        yield from ring["put"](end, OUTBOX)
    private.clear()
    if (yield from ring["push"](end)):
        yield ("notify",)


def front(world: World, ring: dict[str, Any], end: dict[str, Any], private: dict[int, Any]) -> Steps:
    sent = got = 0
    while got < world.messages:
        room = yield from ring["room"](end)
        n = min(room, world.messages - sent)
        if n > 0:
            n = yield from batch(world, n)
            yield from send(ring, end, private, "request", sent, n)
            sent += n
        got += yield from receive(world, ring, end, private, "response", got)
    yield ("done",)


def back(world: World, ring: dict[str, Any], end: dict[str, Any], private: dict[int, Any]) -> Steps:
    done = 0
    while done < world.messages:
        n = yield from receive(world, ring, end, private, "request", done)
        if n > 0:
            yield from send(ring, end, private, "response", done, n)
            done += n
    yield ("done",)


class Process:
    """The states that one process can be in, numbered; found by running it again on what it has read so far.

    A generator cannot be copied. But what it does depends on nothing but the values that it was given, so a state
    is a history of these; and histories after which it stands at the same place with the same variables are one.
    """

    def __init__(self, world: World, side: int) -> None:
        self.world, self.side = world, side
        self.histories: list[tuple[Any, ...]] = []
        self.actions: list[Action] = []
        self._numbers: dict[Any, int] = {}
        self._steps: dict[tuple[int, Any], int] = {}
        self.first = self._number(())

    def _number(self, history: tuple[Any, ...]) -> int:
        steps, end, private = program(self.world, self.side)
        action = next(steps)
        for value in history:
            action = steps.send(value)
        frames = []
        inner: Any = steps
        while inner is not None and hasattr(inner, "gi_frame"):
            frame = inner.gi_frame
            simple = {k: v for k, v in frame.f_locals.items() if isinstance(v, int | str | tuple | np.integer)}
            frames.append((frame.f_code.co_name, frame.f_lasti, tuple(sorted(simple.items()))))
            inner = inner.gi_yieldfrom
        counters = ("notify_sent", "notify_saved")
        fields = tuple(v for k, v in end.items() if k not in counters)
        key = (tuple(frames), fields, tuple(sorted(private.items())), action)
        if key not in self._numbers:
            self._numbers[key] = len(self.actions)
            self.histories.append(history)
            self.actions.append(action)
        return self._numbers[key]

    def step(self, state: int, value: Any) -> int:
        """The state after this one's action has had this result."""
        found = self._steps.get((state, value))
        if found is None:
            found = self._steps[state, value] = self._number((*self.histories[state], value))
        return found


@dataclass(frozen=True)
class State:
    """All of the system. `asked` is how many notifications each side may still get: asked for and not sent."""

    at: tuple[int, int]
    memory: tuple[Any, ...]
    buffers: tuple[tuple[tuple[int, Any, bool], ...], tuple[tuple[int, Any, bool], ...]] = ((), ())
    flags: tuple[bool, bool] = (False, False)
    asked: tuple[int, int] = (1, 1)
    sent: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Found:
    """What an exploration has seen."""

    states: int
    most_notifications: int
    """In any one run, by both sides together."""


def swap(pair: tuple[Any, Any], side: int, value: Any) -> tuple[Any, Any]:
    return (value, pair[1]) if side == 0 else (pair[0], value)


class Explorer:
    """Every order of everything, from the first state on."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.processes = Process(world, FRONT), Process(world, BACK)
        memory = world.memory()
        self.where = {address: i for i, address in enumerate(sorted(memory))}
        self.start = State((self.processes[0].first, self.processes[1].first), tuple(memory[a] for a in sorted(memory)))

    def explore(self) -> Found:
        came: dict[State, tuple[State, str] | None] = {self.start: None}
        todo, most = [self.start], 0
        while todo:
            state = todo.pop()
            stuck = True
            for how, new in self.successors(state):
                stuck = False
                if isinstance(new, str):
                    raise Violation(f"{new}\n{self.way(came, state)}\n{how}")
                if new not in came:
                    came[new] = (state, how)
                    todo.append(new)
            most = max(most, sum(state.sent))
            if stuck and not all(self.action(state, side)[0] == "done" for side in (FRONT, BACK)):
                raise Violation(f"a wake-up is lost\n{self.way(came, state)}")
        return Found(len(came), most)

    def action(self, state: State, side: int) -> Action:
        return self.processes[side].actions[state.at[side]]

    def way(self, came: dict[State, tuple[State, str] | None], state: State) -> str:
        steps: list[str] = []
        while (before := came[state]) is not None:
            state, how = before
            steps.append(how)
        return "\n".join(reversed(steps))

    def successors(self, state: State) -> Iterator[tuple[str, State | str]]:
        """Each thing that can happen next, and the state after it; or what is wrong with it."""
        for side in (FRONT, BACK):
            yield from self.acts(state, side)
            yield from self.commits(state, side)

    def commits(self, state: State, side: int) -> Iterator[tuple[str, State | str]]:
        """A store that leaves the buffer."""
        buffer = state.buffers[side]
        for i, (address, value, release) in enumerate(buffer):
            if i and (self.world.order == "tso" or release or any(a == address for a, _, _ in buffer[:i])):
                continue
            memory = list(state.memory)
            memory[self.where[address]] = value
            left = swap(state.buffers, side, buffer[:i] + buffer[i + 1 :])
            how = f"{'fb'[side]}:        memory[{address}] = {value}"
            yield how, State(state.at, tuple(memory), left, state.flags, state.asked, state.sent)

    def acts(self, state: State, side: int) -> Iterator[tuple[str, State | str]]:
        """What the process itself does next."""
        action = self.action(state, side)
        buffers, flags, asked, sent = state.buffers, state.flags, state.asked, state.sent
        results: list[Any] = [None]
        match action:
            case ("load", address):
                own = [value for a, value, _ in buffers[side] if a == address]
                results = [own[-1] if own else state.memory[self.where[address]]]
            case ("store", address, value, release):
                if address in (REQ_EVENT, RSP_EVENT):
                    # The same event again asks for nothing more.
                    own = [v for a, v, _ in buffers[side] if a == address]
                    if (own[-1] if own else state.memory[self.where[address]]) != value:
                        asked = swap(asked, side, asked[side] + 1)
                buffers = swap(buffers, side, (*buffers[side], (address, value, release)))
            case ("fence",):
                if buffers[side]:
                    return
            case ("choose", most):
                results = list(range(1, most + 1))
            case ("notify",):
                peer = 1 - side
                if asked[peer] == 0:
                    yield f"{'fb'[side]}: {action}", "a notification that nobody asked for"
                asked, flags = swap(asked, peer, asked[peer] - 1), swap(flags, peer, True)
                sent = swap(sent, side, sent[side] + 1)
            case ("wait",):
                if not flags[side]:
                    return
                flags = swap(flags, side, False)
            case ("fail", why):
                yield f"{'fb'[side]}: {action}", why
                return
            case ("done",):
                return
        for result in results:
            at = swap(state.at, side, self.processes[side].step(state.at[side], result))
            how = f"{'fb'[side]}: {' '.join(map(str, action))}" + ("" if result is None else f" -> {result}")
            yield how, State(at, state.memory, buffers, flags, asked, sent)


def explore(world: World) -> Found:
    """Look at everything that can happen in this world. Raises Violation."""
    return Explorer(world).explore()
