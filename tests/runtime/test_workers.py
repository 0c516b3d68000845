import os
import signal
import time

import pytest

from kdjax.runtime import workers


def square(shared, task):
    print("not a result")
    return shared + task * task


def fail(shared, task):
    if task == shared:
        raise ValueError(f"task={task} is bad")
    return task


def die(shared, task):
    if task == shared:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def whoami(shared, task):
    time.sleep(0.05)
    return os.getpid()


def test_results_of_all_tasks():
    for num_workers in (1, 2):
        results = workers.map_tasks(square, 1, range(20), num_workers=num_workers)
        assert sorted(results) == [1 + i * i for i in range(20)]


def test_tasks_run_in_processes_of_their_own():
    pids = set(workers.map_tasks(whoami, None, range(12), num_workers=2))
    assert len(pids) == 2 and os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert set(workers.map_tasks(whoami, None, [1], num_workers=1)) == {os.getpid()}


def test_an_error_is_raised_here_and_ends_the_workers():
    with pytest.raises(ValueError, match="task=7 is bad"):
        list(workers.map_tasks(fail, 7, range(1000), num_workers=2))

    def broken():
        yield 1
        raise ValueError("row 2 is no row")

    with pytest.raises(ValueError, match="row 2 is no row"):
        list(workers.map_tasks(fail, 7, broken(), num_workers=2))


def test_a_killed_worker_is_an_error_in_one_line():
    with pytest.raises(ValueError, match=r"exit code -9.*start again") as error:
        list(workers.map_tasks(die, 3, range(8), num_workers=2))
    assert "\n" not in str(error.value)


def test_few_tasks_are_in_memory_at_a_time():
    taken = []

    def tasks():
        for i in range(50):
            taken.append(i)
            yield i

    results = workers.map_tasks(square, 0, tasks(), num_workers=2)
    next(results)
    time.sleep(0.2)
    results.close()
    assert len(taken) <= 50  # closing stops the reading
    assert workers.num_cores() >= 1
