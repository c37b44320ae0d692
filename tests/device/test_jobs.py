"""Long jobs in threads of their own."""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest

from pvdrivers.control import Jobs


def test_jobs_that_never_end_do_not_keep_others(monkeypatch: pytest.MonkeyPatch) -> None:
    woken, never, ended = threading.Semaphore(0), threading.Event(), []
    jobs = Jobs(woken.release)
    for _ in range(100):
        jobs.submit(never.wait, lambda *_: None)
    jobs.submit(lambda: 5, lambda result, error: ended.append((result, error)))
    assert woken.acquire(timeout=10)
    jobs.deliver()
    assert ended == [(5, None)]
    never.set()


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job has failed, and the next may do."""
    woken, ended = threading.Semaphore(0), []

    def done(result: Any, error: BaseException | None) -> None:
        ended.append(result if error is None else error)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    jobs = Jobs(woken.release)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        jobs.submit(lambda: 5, done)
    jobs.submit(lambda: 6, done)
    while len(ended) < 2:
        assert woken.acquire(timeout=10)
        jobs.deliver()
    assert isinstance(ended[0], OSError) and ended[0].errno == errno.EAGAIN and "TasksMax" in str(ended[0])
    assert ended[1] == 6


def test_no_further_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is there does the job."""
    woken, ended, go = threading.Semaphore(0), [], threading.Event()
    jobs = Jobs(woken.release)
    jobs.submit(go.wait, lambda *_: ended.append("first"))

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    jobs.submit(lambda: None, lambda *_: ended.append("second"))
    go.set()
    while len(ended) < 2:
        assert woken.acquire(timeout=10)
        jobs.deliver()
    assert ended == ["first", "second"]


@pytest.mark.usefixtures("own_fault")
def test_a_fault_in_what_follows_one_job_is_not_the_next_ones(caplog: pytest.LogCaptureFixture) -> None:
    woken, ended = threading.Semaphore(0), []

    def fails(result: Any, error: BaseException | None) -> None:
        raise ValueError("what follows on it")

    jobs = Jobs(woken.release)
    jobs.submit(lambda: 1, fails)
    assert woken.acquire(timeout=10)
    jobs.submit(lambda: 2, lambda result, error: ended.append(result))
    assert woken.acquire(timeout=10)
    jobs.deliver()
    assert ended == [2] and "what follows on it" in caplog.text
