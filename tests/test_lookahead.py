"""Reading one item ahead: what comes out, how far it runs ahead, and how much it keeps alive."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from shardq.lookahead import lookahead

SOON = 10.0  # seconds that a test waits for another thread before it fails


class Value:
    """Something a weak reference can watch."""

    def __init__(self, key: int):
        self.key = key


@pytest.mark.parametrize("num_keys", [0, 1, 2, 3, 20])
def test_items_are_those_of_plain_iteration(num_keys: int):
    keys = [number * 7 % 20 for number in range(num_keys)]
    assert list(lookahead(lambda key: key * key, keys)) == [(key, key * key) for key in keys]


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


def test_at_most_two_values_are_alive_while_one_is_used():
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
        for key, value in lookahead(load_and_tell, range(6)):
            assert value.key == key
            assert key == 5 or loaded[key + 1].wait(SOON)
            assert [alive().key for alive in made if alive()] == ([key, key + 1] if key < 5 else [5])
    finally:
        gc.enable()


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
