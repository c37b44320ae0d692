"""What a disk's rings may have mapped, from all that they want down to nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blkback.pages import IN_FLIGHT, NO_LIMIT, PERSISTENT_BOUND, Plan, plans
from pvdrivers.worker.records import POLICIES, POLICY_COPY, POLICY_MAP, POLICY_PERSISTENT


def test_as_linux_has_it() -> None:
    """One page, 32 requests of eleven segments or of 256."""
    assert plans(POLICY_PERSISTENT, 32, 0, limited=True)[0] == Plan(POLICY_PERSISTENT, 1056, 352)
    assert plans(POLICY_PERSISTENT, 32, 256, limited=True)[0] == Plan(POLICY_PERSISTENT, 1056, 1056)
    assert plans(POLICY_MAP, 32, 0, limited=True)[0] == Plan(POLICY_MAP, 0, 352)
    assert plans(POLICY_MAP, 32, 0, limited=False) == [Plan(POLICY_MAP, 0, NO_LIMIT)]
    assert Plan(POLICY_PERSISTENT, 1056, 352).pages(queues=2, order=1) == 2 * (2 + 1056 + 352)


@given(
    policy=st.sampled_from(list(POLICIES.values())),
    nr_ents=st.sampled_from([32, 64, 512]),
    segments=st.integers(0, 4096),
    queues=st.integers(1, 32),
    order=st.integers(0, 4),
)
def test_less_and_less(policy: int, nr_ents: int, segments: int, queues: int, order: int) -> None:
    found = plans(policy, nr_ents, segments, limited=True)
    pages = [plan.pages(queues, order) for plan in found]
    assert pages == sorted(set(pages), reverse=True)
    assert {plan.policy for plan in found} <= {policy, POLICY_COPY}
    assert found[-1] == Plan(POLICY_COPY) and pages[-1] == queues << order
    for plan in found[:-1]:
        assert (plan.bound > 0) == (policy == POLICY_PERSISTENT)
        assert plan.bound <= PERSISTENT_BOUND and 0 < plan.in_flight <= IN_FLIGHT
