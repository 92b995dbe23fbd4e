"""Work beside the computation: what comes out, how far it runs ahead or behind, and how much it keeps alive."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from shardq.background import SPARE, behind, finish_interrupted, lookahead, one_by_one

MAX_BEHIND = 1 + SPARE  # of one thread
SOON = 10.0  # seconds that a test waits for another thread before it fails


class Value:
    """Something a weak reference can watch."""

    def __init__(self, key: int):
        self.key = key


@pytest.mark.parametrize("iterate", [lookahead, one_by_one])
@pytest.mark.parametrize("num_keys", [0, 1, 2, 3, 20])
def test_items_are_those_of_plain_iteration(num_keys: int, iterate: Callable):
    keys = [number * 7 % 20 for number in range(num_keys)]
    assert list(iterate(lambda key: key * key, keys)) == [(key, key * key) for key in keys]


def test_one_by_one_keeps_nothing_but_the_item_in_use():
    alive: list[weakref.ref] = []

    def load(key: int) -> Value:
        assert not any(value() for value in alive)
        value = Value(key)
        alive.append(weakref.ref(value))
        return value

    for key, value in one_by_one(load, range(3)):
        assert value.key == key and len(alive) == key + 1
        del value


def test_keys_may_come_from_a_generator():
    assert list(lookahead(str, (key for key in "abc"))) == [("a", "a"), ("b", "b"), ("c", "c")]


def test_keys_are_asked_for_one_ahead():
    asked = []

    def keys() -> Iterator[int]:
        for number in range(100):
            asked.append(number)
            yield number

    items = lookahead(lambda key: key, keys())
    assert [next(items), next(items), next(items)] == [(0, 0), (1, 1), (2, 2)]
    assert asked == [0, 1, 2, 3]
    items.close()


def test_exactly_one_load_runs_ahead_while_an_item_is_used():
    started = [threading.Event() for _ in range(5)]

    def load(key: int) -> int:
        started[key].set()
        return key

    for key, _ in lookahead(load, range(5)):
        if key < 4:
            assert started[key + 1].wait(SOON)
        assert not any(event.is_set() for event in started[key + 2 :])


def test_load_runs_beside_the_work_on_the_item_before():
    """The load of item 1 ends only after the work on item 0 has begun; in turn, they would wait for ever."""
    working = threading.Event()

    def load(key: int) -> threading.Thread:
        assert key == 0 or working.wait(SOON)
        return threading.current_thread()

    for key, thread in lookahead(load, range(2)):
        assert thread is not threading.main_thread()
        if key == 0:
            working.set()


def test_loads_never_run_beside_each_other():
    running, most = [], []

    def load(key: int) -> int:
        running.append(key)
        most.append(len(running))
        time.sleep(0.001)
        running.pop()
        return key

    list(lookahead(load, range(50)))
    assert max(most) == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_alive_are_the_value_in_use_and_one_for_each_thread(threads: int):
    loaded = [threading.Event() for _ in range(6)]
    made: list[weakref.ref] = []

    def load(key: int) -> Value:
        value = Value(key)
        made.append(weakref.ref(value))
        return value

    def load_and_tell(key: int) -> Value:
        try:
            return load(key)
        finally:
            loaded[key].set()

    gc.disable()  # what only the garbage collector frees counts as alive
    try:
        for key, value in lookahead(load_and_tell, range(6), threads=threads):
            ahead = range(key + 1, min(key + 1 + threads, 6))
            assert value.key == key
            assert all(loaded[other].wait(SOON) for other in ahead)
            assert sorted(alive().key for alive in made if alive()) == [key, *ahead]
    finally:
        gc.enable()


@pytest.mark.parametrize("threads", [2, 3])
def test_as_many_loads_run_beside_each_other_as_there_are_threads(threads: int):
    """Each waits for as many to be under way; fewer would wait for ever."""
    together, running, most = threading.Barrier(threads), [], []

    def load(key: int) -> int:
        running.append(key)
        most.append(len(running))
        together.wait(SOON)
        running.remove(key)
        return -key

    keys = range(4 * threads)
    assert list(lookahead(load, keys, threads=threads)) == [(key, -key) for key in keys]
    assert max(most) <= threads


def test_error_in_one_of_several_threads_comes_where_its_item_would_have_come():
    def load(key: int) -> int:
        if key == 2:
            raise OSError(f"disk failed at {key}")
        time.sleep(0.01)
        return key

    items = lookahead(load, range(9), threads=4)
    assert [next(items), next(items)] == [(0, 0), (1, 1)]
    with pytest.raises(OSError, match="disk failed at 2"):
        next(items)


def is_gone(reference: weakref.ref) -> bool:
    """Whether a value goes within a moment."""
    deadline = time.monotonic() + 2
    while reference() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    return reference() is None


def test_value_that_the_caller_gave_up_is_gone_while_the_next_is_still_loading():
    gone, made = [], []

    def load(key: int) -> Value:
        gone.extend(is_gone(reference) for reference in made[-1:])
        value = Value(key)
        made.append(weakref.ref(value))
        return value

    for _, value in lookahead(load, range(4)):
        del value
    assert gone == [True, True, True]


def test_error_comes_where_its_item_would_have_come():
    def load(key: int) -> int:
        if key == 2:
            raise OSError(f"disk failed at {key}")
        return key

    items = lookahead(load, range(5))
    assert [next(items), next(items)] == [(0, 0), (1, 1)]
    with pytest.raises(OSError, match="disk failed at 2"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_nothing_is_loaded_after_an_error():
    asked = []

    def load(key: int) -> int:
        asked.append(key)
        if key == 1:
            raise ValueError
        return key

    with pytest.raises(ValueError):
        list(lookahead(load, range(5)))
    assert asked == [0, 1]


def test_caller_that_stops_early_leaves_no_thread():
    before = threading.active_count()
    items = lookahead(lambda key: key, range(100))
    next(items)
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before


@contextmanager
def noted(times: list[tuple[float, float]]) -> Iterator[None]:
    """Note when a wait began and ended."""
    start = time.monotonic()
    yield
    times.append((start, time.monotonic()))


def test_wait_for_a_value_is_entered_and_nothing_else():
    """Only the load of item 1 is slow; what the caller does with an item takes longer still and is no wait."""
    times: list[tuple[float, float]] = []
    delays = {0: 0.0, 1: 0.2, 2: 0.0}
    for _ in lookahead(lambda key: time.sleep(delays[key]), delays, lambda: noted(times)):
        pass
    for _ in lookahead(lambda key: None, range(3), lambda: noted(times)):
        time.sleep(0.05)
    waits = [end - start for start, end in times]
    assert len(waits) == 6 and waits[1] > 0.15
    assert max(waits[:1] + waits[2:]) < 0.05


class TestBehind:
    def test_work_is_done_in_order_and_all_of_it_when_the_body_ends(self):
        done = []

        def work(number: int, text: str) -> None:
            time.sleep(0.001)
            done.append((number, text))

        with behind(work) as later:
            for number in range(20):
                later(number, str(number))
        assert done == [(number, str(number)) for number in range(20)]

    def test_several_threads_work_beside_each_other(self):
        """Each waits for three to be under way; fewer would wait for ever."""
        together, done = threading.Barrier(3), []

        def work(number: int) -> None:
            together.wait(SOON)
            done.append(number)

        with behind(work, threads=3) as later:
            for number in range(9):
                later(number)
        assert sorted(done) == list(range(9))

    def test_no_work_at_all_is_no_error(self):
        with behind(lambda: None):
            pass

    def test_work_goes_on_beside_the_body(self):
        """The work ends only after the body has gone on; in turn, they would wait for ever."""
        went_on, threads = threading.Event(), []

        def work() -> None:
            assert went_on.wait(SOON)
            threads.append(threading.current_thread())

        with behind(work) as later:
            later()
            went_on.set()
        assert len(threads) == 1 and threads[0] is not threading.main_thread()

    def test_body_waits_where_more_than_two_values_would_be_pending(self):
        allowed, entered = threading.Semaphore(0), []

        def work(number: int) -> None:
            assert allowed.acquire(timeout=SOON)

        def release_one() -> None:
            entered.append(len(accepted))
            allowed.release()

        @contextmanager
        def waiting() -> Iterator[None]:
            release_one()
            yield

        accepted: list[int] = []
        with behind(work, waiting) as later:
            for number in range(6):
                later(number)
                accepted.append(number)
                assert len(accepted) - len(entered) <= MAX_BEHIND
        assert MAX_BEHIND == 2
        # The first two are taken at once; from then on one has to be done before the next is taken.
        assert entered == [2, 3, 4, 5, 6, 6]

    def test_values_that_were_worked_on_are_not_kept_alive(self):
        alive: list[weakref.ref] = []
        most = []

        def work(value: Value) -> None:
            del value

        gc.disable()  # what only the garbage collector frees counts as alive
        try:
            with behind(work) as later:
                for number in range(20):
                    value = Value(number)
                    alive.append(weakref.ref(value))
                    later(value)
                    del value
                    most.append(sum(reference() is not None for reference in alive))
            assert sum(reference() is not None for reference in alive) == 0
        finally:
            gc.enable()
        assert max(most) <= MAX_BEHIND

    @pytest.mark.parametrize("failing", [0, 3, 9])
    def test_error_is_raised_at_a_later_call_or_at_the_end(self, failing: int):
        accepted = []

        def work(number: int) -> None:
            if number == failing:
                raise OSError(f"disk failed at {number}")

        with pytest.raises(OSError, match=f"disk failed at {failing}"), behind(work) as later:
            for number in range(10):
                later(number)
                accepted.append(number)
        assert accepted[-1] <= min(failing + MAX_BEHIND, 9), "went on long after the error"

    def test_error_of_the_body_is_the_one_that_is_raised(self):
        def work() -> None:
            raise OSError

        with pytest.raises(KeyError), behind(work) as later:
            later()
            raise KeyError

    @pytest.mark.parametrize("fails", [False, True])
    def test_no_thread_is_left(self, fails: bool):
        before = threading.active_count()
        try:
            with behind(lambda: 1 / 0 if fails else 0) as later:
                later()
                assert threading.active_count() == before + 1
        except ZeroDivisionError:
            assert fails
        assert threading.active_count() == before


COUNT_THREADS = """
import torch
from shardq.background import behind, lookahead
seen = [count for _, count in lookahead(lambda key: torch.get_num_threads(), [0])]
with behind(lambda: seen.append(torch.get_num_threads())) as later:
    later()
print(*seen, torch.get_num_threads())
"""


def test_background_computes_on_one_core_and_leaves_the_others_to_the_computation():
    """In a process of its own: torch takes over a thread's number of cores at that thread's first computation."""
    command = [sys.executable, "-c", COUNT_THREADS]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    assert subprocess.run(command, capture_output=True, text=True, env=environment).stdout.split() == ["1", "1", "2"]


def test_end_after_an_interruption_waits_for_no_thread_that_has_nothing_to_do():
    """The frame that loads ahead is kept for the traceback, and its loader with it."""

    def compute() -> None:
        loaded = lookahead(lambda key: key, range(9))
        next(loaded)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupted:
        compute()
    end = threading.Thread(target=finish_interrupted, args=(interrupted.value,), daemon=True)
    end.start()
    end.join(20)
    assert not end.is_alive()
