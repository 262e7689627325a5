"""Blocks are read ahead and written behind: one of each, in order, and no error is lost."""

import threading
from itertools import count

import pytest

from quantize.errors import QuantizeError
from quantize.pipeline.overlap import WriteBehind, read_ahead


def test_one_item_is_read_while_the_one_before_it_is_in_use():
    read, here = [threading.Event() for _ in range(4)], threading.get_ident()

    def reading(number):
        assert threading.get_ident() != here
        read[number].set()
        return number

    found = read_ahead(range(4), reading)
    for number in range(4):
        assert next(found) == number
        assert number == 3 or read[number + 1].wait(5)
        assert not any(event.is_set() for event in read[number + 2 :])


def test_an_item_that_cannot_be_read_is_an_error_where_it_is_used():
    def reading(number):
        if number:
            raise QuantizeError("model.layers.1 is damaged")
        return number

    found = read_ahead(range(3), reading)
    assert next(found) == 0
    with pytest.raises(QuantizeError, match="is damaged"):
        next(found)


def test_nothing_is_read_behind_the_last_item_in_use():
    done = []
    found = read_ahead(count(), done.append)
    next(found)
    found.close()
    assert len(done) == 2


def test_things_are_done_in_order_and_what_fails_is_raised():
    done = []

    def failing():
        raise QuantizeError("the disk is full")

    with WriteBehind() as behind:
        for number in range(3):
            behind.do(lambda number=number: done.append(number))
    assert done == [0, 1, 2]
    with pytest.raises(QuantizeError, match="the disk is full"), WriteBehind() as behind:
        behind.do(failing)
        behind.do(lambda: done.append(3))
    with pytest.raises(QuantizeError, match="the disk is full"), WriteBehind() as behind:
        behind.do(failing)
    assert done == [0, 1, 2]


def test_what_was_asked_for_is_done_before_an_error_goes_on():
    begun, done = threading.Event(), []

    def slow():
        begun.wait(5)
        done.append("written")

    with pytest.raises(KeyboardInterrupt), WriteBehind() as behind:
        behind.do(slow)
        begun.set()
        raise KeyboardInterrupt
    assert done == ["written"]
