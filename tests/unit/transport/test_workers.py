import threading

import pytest

from ztserve.transport.workers import Workers


def test_each_job_runs_once() -> None:
    workers, ran = Workers(8), []
    done = threading.Semaphore(0)
    for number in range(200):
        workers.submit(lambda n=number: (ran.append(n), done.release()))
    for _ in range(200):
        assert done.acquire(timeout=5)
    workers.close()
    assert sorted(ran) == list(range(200))


def test_jobs_run_at_the_same_time_and_threads_are_reused() -> None:
    workers, together = Workers(8), threading.Barrier(5)
    threads, done = set(), threading.Semaphore(0)

    def job() -> None:
        together.wait(5)
        threads.add(threading.get_ident())
        done.release()

    for _ in range(3):
        for _ in range(4):
            workers.submit(job)
        together.wait(5)
        for _ in range(4):
            assert done.acquire(timeout=5)
    workers.close()
    assert len(threads) <= 8


def test_closed_workers_end_their_threads() -> None:
    workers = Workers(8)
    done = threading.Event()
    workers.submit(done.set)
    assert done.wait(5)
    [thread] = [
        t for t in threading.enumerate() if getattr(t, "_workers", None) is workers
    ]
    workers.close()
    thread.join(timeout=5)
    assert not thread.is_alive()


@pytest.mark.parametrize("fault", [ZeroDivisionError, SystemExit])
def test_a_job_that_fails_leaves_its_thread_to_the_next(caplog, fault):
    def fail():
        raise fault

    workers = Workers(1)
    done = threading.Event()
    workers.submit(fail)
    workers.submit(done.set)
    assert done.wait(5)
    workers.close()
    assert "ended its thread's work" in caplog.text


def test_there_are_no_more_threads_than_may_be_and_jobs_wait_in_order():
    workers, go, ran = Workers(1), threading.Event(), []
    done = threading.Semaphore(0)
    for number in range(20):
        workers.submit(lambda n=number: (go.wait(5), ran.append(n), done.release()))
    assert workers._started == 1
    go.set()
    for _ in range(20):
        assert done.acquire(timeout=5)
    workers.close()
    assert ran == list(range(20))


def test_a_job_for_which_there_is_no_thread_waits_for_one(monkeypatch, caplog):
    workers, go, done = Workers(8), threading.Event(), threading.Event()
    workers.submit(go.wait, 5)

    def none(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    workers.submit(done.set)
    assert "no thread could be started" in caplog.text
    go.set()
    assert done.wait(5)
    workers.close()
