"""The ring of keys, for every queue and batch size."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.parts.queue import Queue


@given(st.integers(1, 17), st.lists(st.integers(0, 40), max_size=6))
def test_it_holds_the_last_keys_in_order(size: int, batches: list[int]) -> None:
    queue, count = Queue(size, 1), 0
    for batch in batches:
        queue.enqueue(torch.arange(count, count + batch).float().view(-1, 1))
        count += batch
    assert queue.written.item() == count
    for number in range(max(0, count - size), count):
        assert queue.keys[number % size].item() == number
    assert queue.filled().item() == min(1.0, torch.tensor(count / size).item())


def test_it_is_part_of_the_state_and_begins_with_unit_keys() -> None:
    queue = Queue(5, 3)
    assert set(queue.state_dict()) == {"keys", "written"}
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(5))


def test_one_large_batch_is_many_small_ones() -> None:
    keys = torch.randn(23, 2)
    one, many = Queue(7, 2), Queue(7, 2)
    many.load_state_dict(one.state_dict())
    one.enqueue(keys)
    for part in keys.split(4):
        many.enqueue(part)
    assert torch.equal(one.keys, many.keys) and torch.equal(one.written, many.written)


def test_its_age_is_that_of_the_oldest_real_key() -> None:
    queue = Queue(10, 3)
    ages = []
    for _ in range(5):
        ages.append(queue.age(4).item())
        queue.enqueue(torch.randn(4, 3))
    assert ages == [0, 1, 2, 2.5, 2.5]
