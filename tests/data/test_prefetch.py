"""Reading ahead changes when a batch is read, and nothing of what it is."""

from __future__ import annotations

import threading

import pytest
import torch

from onym.data.batches import Batch
from onym.data.prefetch import Prefetcher

CPU = torch.device("cpu")


class Source:
    def __init__(self) -> None:
        self.read: list[int] = []
        self.threads: dict[int, threading.Thread] = {}
        self.done: dict[int, threading.Event] = {number: threading.Event() for number in range(20)}

    def __call__(self, number: int) -> Batch:
        if number == 13:
            raise OSError("the disk is gone")
        self.read.append(number)
        self.threads[number] = threading.current_thread()
        self.done[number].set()
        return torch.tensor(number), torch.tensor(number + 1)


def test_each_batch_is_the_one_that_was_asked_for_and_read_once() -> None:
    source = Source()
    batches = Prefetcher(source, CPU)
    for number in range(10):
        assert batches.take(number, number + 1) == (number, number + 1)
    batches.close()
    assert source.read[:10] == list(range(10))


def test_the_next_one_is_read_before_it_is_asked_for_in_a_thread() -> None:
    source = Source()
    batches = Prefetcher(source, CPU)
    batches.take(0, 1)
    assert source.done[1].wait(10)
    assert source.threads[0] is threading.current_thread()
    assert source.threads[1] is not threading.current_thread()
    batches.close()


def test_after_a_jump_it_is_the_right_one_all_the_same() -> None:
    batches = Prefetcher(Source(), CPU)
    assert batches.take(3, 4) == (3, 4)
    assert batches.take(8, 9) == (8, 9)
    assert batches.take(9, 2) == (9, 10)
    assert batches.take(2, 3) == (2, 3)
    batches.close()


def test_what_reading_raises_arrives_with_the_batch_that_it_is_about() -> None:
    batches = Prefetcher(Source(), CPU)
    assert batches.take(12, 13) == (12, 13)
    with pytest.raises(OSError, match="the disk is gone"):
        batches.take(13, 14)
    batches.close()


def test_waiting_is_counted() -> None:
    batches = Prefetcher(Source(), CPU)
    batches.take(0, 1)
    assert batches.waited_seconds > 0
    batches.close()
