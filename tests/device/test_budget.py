"""Budgets of mapped pages: of a host, a process, a domain and a device, by several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pvdrivers.budget import Budget

STEPS = (100, 50, 25, 1)


def test_no_limit(tmp_path: Path) -> None:
    budget = Budget(tmp_path, None)
    assert not budget.limited
    assert budget.reserve("a", 1, [1 << 50]) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_less_and_less(tmp_path: Path) -> None:
    budget = Budget(tmp_path, 190, per_domain=1000)
    assert budget.reserve("a", 1, STEPS) == (0, "")
    index, why = budget.reserve("b", 1, STEPS)
    assert index == 1 and why.startswith("90 pages are left of 190 that this host may have mapped; raise gnttab_max_")
    assert budget.reserve("c", 2, STEPS)[0] == 2
    assert budget.reserve("d", 2, STEPS)[0] == 3
    assert budget.reserve("e", 2, [20])[0] == 0, "the last is had in any case"
    # Who asks again gives back first.
    assert budget.reserve("a", 1, STEPS)[0] == 1
    budget.give_back("a")
    budget.give_back("a")
    budget.give_back("b")
    assert budget.reserve("f", 2, STEPS) == (0, "")


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"pages": 120, "per_domain": 200}, "20 pages are left of 120 that this process may have; raise --grant-pages"),
        ({"per_domain": 110}, "10 pages are left of 110 that domain 1 may have; raise --grant-pages-per-domain"),
        ({"pages": 300}, "50 pages are left of 150 that domain 1 may have; raise --grant-pages-per-domain"),
    ],
)
def test_which_limit(limits: dict[str, int], says: str, tmp_path: Path) -> None:
    budget = Budget(tmp_path, None if "pages" in limits else 10_000, **limits)
    assert budget.reserve("a", 1, STEPS) == (0, "")
    assert budget.reserve("b", 1, [100, 1]) == (1, says)
    other = budget.reserve("c", 2, [100, 1])[0]
    assert other == (1 if limits.get("pages") == 120 else 0)


def test_what_the_kernel_lets_a_process_map(tmp_path: Path) -> None:
    """Whatever the operator gives it, and whatever other processes have: each has mappings of its own."""
    first = Budget(tmp_path, 10_000, pages=5_000, mappings=150, per_domain=1000)
    other = Budget(tmp_path, 10_000, mappings=150)
    assert first.reserve("a", 1, STEPS) == (0, "")
    index, why = first.reserve("b", 1, STEPS)
    assert index == 1
    assert why.startswith("50 pages are left of 150 that a process may have mapped; raise the sysctl vm.max_map_count")
    assert other.limited and other.reserve("c", 2, [75, 1]) == (0, "")
    assert other.reserve("d", 2, [1, 0])[1].startswith("0 pages are left of 75 that domain 2 may have")
    assert Budget(tmp_path, None, mappings=150).limited


def test_the_limit_of_a_disk(tmp_path: Path) -> None:
    """It holds where there is no other."""
    for budget in (Budget(tmp_path, None), Budget(tmp_path, 1000)):
        index, why = budget.reserve("a", 1, STEPS, 60)
        assert index == 1 and why == "60 pages are left of 60 that the disk may have; raise its option grant_pages"


def test_pages_that_were_given_do_not_depend_on_others(tmp_path: Path) -> None:
    """--grant-pages is for one process: the operator has shared them out."""
    first, second = Budget(tmp_path, 150, per_domain=150), Budget(tmp_path, 150, pages=500)
    assert first.reserve("a", 1, STEPS) == (0, "")
    assert second.reserve("b", 2, STEPS) == (0, "")
    assert first.reserve("c", 3, STEPS)[0] == 3, "but others see what it has"


CHILD = """
import sys, time
from pathlib import Path
from pvdrivers.budget import Budget

budget = Budget(Path(sys.argv[1]), 150, per_domain=150)
print(budget.reserve("theirs", 7, [100, 50, 1])[0], flush=True)
sys.stdin.read()
"""


def test_a_process_that_is_killed_gives_back(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "0\n"
        budget = Budget(tmp_path, 150)
        assert budget.reserve("ours", 8, STEPS)[0] == 1
        assert sorted(p.name for p in (tmp_path / "budget").iterdir()) == sorted(
            ["lock", str(child.pid), str(os.getpid())]
        )
        assert budget.reserve("more", 7, [1, 0])[0] == 1, "domain 7 has had its half"
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert budget.reserve("ours", 8, [150, 50])[0] == 1  # half of it is a domain's
        assert budget.reserve("more", 9, [75, 1]) == (0, "")
        assert sorted(p.name for p in (tmp_path / "budget").iterdir()) == sorted(["lock", str(os.getpid())])
        budget.close()
        assert [p.name for p in (tmp_path / "budget").iterdir()] == ["lock"]
    finally:
        child.kill()
        child.communicate()


def test_a_file_of_another_with_our_number(tmp_path: Path) -> None:
    """A stale one is taken over; one in use, of a process in another namespace, is left alone and counted."""
    (tmp_path / "budget").mkdir()
    (tmp_path / "budget" / str(os.getpid())).write_text("old 1 140\nnonsense\nx y z\n")
    first = Budget(tmp_path, 150, per_domain=150)
    assert first.reserve("a", 1, STEPS) == (0, "")
    second = Budget(tmp_path, 150, per_domain=150)
    assert second.reserve("b", 1, STEPS)[0] == 1
    assert (tmp_path / "budget" / f"{os.getpid()}-1").read_text() == "b 1 50\n"


def test_a_run_directory_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It counts for itself, and says so once."""
    (tmp_path / "budget").write_text("in the way")
    budget = Budget(tmp_path, 150, per_domain=150)
    assert budget.reserve("a", 1, STEPS) == (0, "")
    assert budget.reserve("b", 1, STEPS)[0] == 1
    assert caplog.text.count("other processes do not see") == 1


class Budgets(RuleBasedStateMachine):
    """Two processes of one host against sums."""

    @initialize(
        host=st.integers(0, 300),
        own=st.lists(st.one_of(st.none(), st.integers(0, 200)), min_size=2, max_size=2),
        per_domain=st.one_of(st.none(), st.integers(0, 200)),
    )
    def begin(self, host: int, own: list[int | None], per_domain: int | None) -> None:
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        path = Path(self.directory.name)
        self.host, self.own = host, own
        self.per_domain = [
            (host if mine is None else mine) // 2 if per_domain is None else per_domain for mine in own
        ]
        self.budgets = [Budget(path, host, pages=mine, per_domain=per_domain) for mine in own]
        self.had: list[dict[str, tuple[int, int]]] = [{}, {}]

    @rule(who=st.integers(0, 1), device=st.sampled_from("abcd"), domid=st.integers(1, 3),
          most=st.one_of(st.none(), st.integers(0, 120)),
          steps=st.sets(st.integers(0, 150), min_size=1, max_size=4).map(lambda s: sorted(s, reverse=True)))
    def reserve(self, who: int, device: str, domid: int, most: int | None, steps: list[int]) -> None:
        self.had[who].pop(device, None)
        index, why = self.budgets[who].reserve(device, domid, steps, most)
        fitting = [k for k, pages in enumerate(steps) if self.fits(who, domid, pages, most)]
        assert index == (fitting[0] if fitting else len(steps) - 1)
        assert (why != "") == (index > 0)
        self.had[who][device] = (domid, steps[index])

    def fits(self, who: int, domid: int, pages: int, most: int | None) -> bool:
        everybody = [*self.had[0].values(), *self.had[1].values()]
        mine = sum(n for _, n in self.had[who].values())
        limit = self.own[who]
        return (
            (most is None or pages <= most)
            and pages + sum(n for d, n in everybody if d == domid) <= self.per_domain[who]
            and (pages + mine <= limit if limit is not None else pages + sum(n for _, n in everybody) <= self.host)
        )

    @rule(who=st.integers(0, 1), device=st.sampled_from("abcd"))
    def give_back(self, who: int, device: str) -> None:
        self.budgets[who].give_back(device)
        self.had[who].pop(device, None)

    @invariant()
    def as_it_stands_there(self) -> None:
        for budget, had in zip(getattr(self, "budgets", ()), getattr(self, "had", ())):
            if budget._path is not None:
                lines = [f"{name} {domid} {pages}\n" for name, (domid, pages) in sorted(had.items())]
                assert budget._path.read_text() == "".join(lines)

    def teardown(self) -> None:
        for budget in getattr(self, "budgets", ()):
            budget.close()
        if hasattr(self, "directory"):
            self.directory.cleanup()


TestBudgets = Budgets.TestCase
TestBudgets.settings = settings(max_examples=50, stateful_step_count=20)
