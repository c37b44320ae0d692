"""No lost wake-up, no overrun, no needless notification: in every order of every access. And mutants are found."""

from __future__ import annotations

import pytest

from tests.rings.model import SOURCE, Violation, World, explore

pytestmark = [
    pytest.mark.jit_only("the checker reads the source and compiles nothing, so this would be the same once more"),
    pytest.mark.no_boundscheck(
        "the checker reads the source and compiles nothing, so this would be the same once more"
    ),
]

WORLDS = [
    World(nr_ents=1, messages=2),
    World(nr_ents=2, messages=3, start=2**32 - 2),
    World(nr_ents=2, messages=4, start=2**31 - 1),
    World(nr_ents=4, messages=3, start=0),
    World(nr_ents=1, messages=2, order="pso"),
    World(nr_ents=2, messages=3, order="pso"),
]
LARGE = [
    World(nr_ents=1, messages=3),
    World(nr_ents=2, messages=3, choices=True),
    World(nr_ents=2, messages=3, choices=True, order="pso"),
    World(nr_ents=1, messages=4, order="pso"),
]


def check(world: World) -> None:
    found = explore(world)
    # One for each message and direction is what a protocol without hold-off would send.
    assert 2 <= found.most_notifications <= 2 * world.messages
    assert found.states > 400


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: f"{w.nr_ents}-{w.messages}-{w.order}")
def test_every_order(world: World) -> None:
    check(world)


@pytest.mark.slow
@pytest.mark.parametrize("world", LARGE, ids=lambda w: f"{w.nr_ents}-{w.messages}-{w.order}")
def test_every_order_of_more(world: World) -> None:
    check(world)


BARRIER_IN_PUSH = "    full_barrier()\n    notify ="
BARRIER_IN_CHECK = "    full_barrier()\n    return available(end)"
SET_EVENT = 'store_once32(e["peer_event"], np.uint32((e["cons"] + 1) & 0xFFFFFFFF))'
NOTIFY = 'distance(new, load_once32(e["prod_event"])) < fresh'
PUBLISH = 'store_release32(e["prod"], np.uint32(new))'
MUTANTS = {
    "no barrier in push": (BARRIER_IN_PUSH, "    notify =", "lost"),
    "no barrier in final_check": (BARRIER_IN_CHECK, "    return available(end)", "lost"),
    "no last look": (BARRIER_IN_CHECK, "    full_barrier()\n    return 0", "lost"),
    "event set after the last look": (
        f"    {SET_EVENT}\n"
        + "    # The peer sees the event before we look once more. Pairs with the barrier in `push`.\n"
        "    full_barrier()\n    return available(end)",
        f"    full_barrier()\n    n = available(end)\n    {SET_EVENT}\n    return n",
        "lost",
    ),
    "event never set": (SET_EVENT, "pass", "lost"),
    "event one too early": (SET_EVENT, SET_EVENT.replace(" + 1", ""), "lost"),
    "event one too late": (SET_EVENT, SET_EVENT.replace(" + 1", " + 2"), "lost"),
    "notify one too often": (NOTIFY, NOTIFY.replace("<", "<="), "nobody asked"),
    "notify always": (NOTIFY, "new == new", "nobody asked"),
    "notify never": (NOTIFY, "new != new", "lost"),
    "publish after looking at the event": (
        PUBLISH,
        'event = load_once32(e["prod_event"])\n    ' + PUBLISH,
        "lost",
    ),
    "room for one too many": (
        'return e["nr_ents"] - e["credit"] - signed',
        'return e["nr_ents"] + 1 - e["credit"] - signed',
        "read|refused",
    ),
    "publish before writing": (
        'copy_bytes(slot(end, e["prod_pvt"]), message, e["entry_size"])\n    advance_prod(end, 1)',
        'advance_prod(end, 1)\n    store_release32(e["prod"], np.uint32(e["prod_pvt"]))\n'
        '    copy_bytes(slot(end, e["prod_pvt"] - 1), message, e["entry_size"])',
        "read",
    ),
}


def mutate(name: str) -> tuple[str, str]:
    """The source of this mutant, and what should be said of it."""
    old, new, said = MUTANTS[name]
    source = SOURCE.replace(old, new)
    if name == "publish after looking at the event":
        source = source.replace(NOTIFY, "distance(new, event) < fresh")
    assert source != SOURCE, "the source has changed, and this mutant with it"
    return source, said


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found(name: str) -> None:
    source, said = mutate(name)
    with pytest.raises(Violation, match=said):
        for start in (2**32 - 1, 0):
            for nr_ents in (1, 2):
                explore(World(nr_ents, messages=nr_ents + 1, start=start, source=source))


def test_a_release_that_is_none_is_found_where_stores_overtake() -> None:
    source = SOURCE.replace("store_release32(e[", "store_once32(e[")
    explore(World(2, 3, source=source))  # x86 would not show it
    with pytest.raises(Violation, match="read"):
        explore(World(2, 3, order="pso", source=source))
