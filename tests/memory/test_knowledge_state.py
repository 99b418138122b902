"""K against a plain loop, exact in any order of arrival."""

import numpy as np
import pytest
import torch

from trelm_ds.errors import CheckpointError
from trelm_ds.memory.knowledge_state import KnowledgeState, frequency_bands

N, DISCOUNT = 12, 0.2


def observations(seed, steps=6):
    """For each step, some micro-batches of (entity [K], group [K], given [G], probability [G])."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(steps):
        step = []
        for _ in range(3):
            count = int(rng.integers(0, 6))
            keys = rng.integers(0, N - 2, count)  # two entities are never seen
            widths = rng.integers(1, 4, count)
            group = np.repeat(np.arange(count), widths)
            entity = keys[group]
            text = rng.integers(0, len(group) + 1, 3)  # text targets in between
            group, entity = np.insert(group, text, -1), np.insert(entity, text, -1)
            probability = rng.random(count).astype(np.float32)
            given = rng.random(count) < 0.3
            step.append(tuple(map(torch.from_numpy, (entity, group, given, probability))))
        made.append(step)
    return made


def feed(state, steps, applied=lambda step: True, window=2, order=1):
    for number, step in enumerate(steps, 1):
        for batch in step[::order]:
            state.stage(*batch)
        state.commit() if applied(number) else state.drop()
        if number % window == 0:
            state.close_window()


def plain(steps, applied=lambda step: True, window=2):
    value, count, pending = {}, {}, {}
    for number, step in enumerate(steps, 1):
        if applied(number):
            for entity, group, given, probability in step:
                for g, p in enumerate(probability.tolist()):
                    if given[g]:
                        continue
                    key = int(entity[group.tolist().index(g)])
                    pending.setdefault(key, []).append(p)
        if number % window == 0:
            for key, found in pending.items():
                mean, m = sum(found) / len(found), len(found)
                kept = (1 - DISCOUNT) ** m if key in value else 0.0
                value[key] = kept * value.get(key, 0.0) + (1 - kept) * mean
                count[key] = count.get(key, 0) + m
            pending = {}
    return value, count


@pytest.mark.parametrize("skipped", [(), (2, 3)])
def test_the_average_equals_a_plain_loop(skipped):
    steps = observations(0)
    state = KnowledgeState(N, DISCOUNT)
    feed(state, steps, lambda n: n not in skipped)
    value, count = plain(steps, lambda n: n not in skipped)
    assert 5 < len(value) <= N - 2 and max(count.values()) > 2
    for entity in range(N):
        assert state.value[entity] == pytest.approx(value.get(entity, 0.0), abs=1e-6)
        assert state.count[entity] == count.get(entity, 0)


def test_order_and_micro_batches_do_not_matter_bit_by_bit():
    steps = observations(1)
    states = [KnowledgeState(N, DISCOUNT) for _ in range(2)]
    feed(states[0], steps)
    feed(states[1], [step[::-1] for step in steps])
    np.testing.assert_array_equal(states[0].value, states[1].value)


def test_an_open_window_survives_saving():
    steps = observations(2)
    straight, first, second = (KnowledgeState(N, DISCOUNT) for _ in range(3))
    feed(straight, steps)
    feed(first, steps[:3])
    second.load_state_dict(first.state_dict(), is_main=True)
    for number, step in enumerate(steps[3:], 4):
        for batch in step:
            second.stage(*batch)
        second.commit()
        if number % 2 == 0:
            second.close_window()
    np.testing.assert_array_equal(straight.value, second.value)
    np.testing.assert_array_equal(straight.count, second.count)
    with pytest.raises(CheckpointError, match="another number"):
        KnowledgeState(N + 1, DISCOUNT).load_state_dict(first.state_dict(), is_main=True)


def test_bands_hold_a_third_of_the_mentions_each():
    frequency = np.array([0, 60, 30, 30, 20, 20, 10, 10, 0])
    bands = frequency_bands(frequency)
    assert {k: v.tolist() for k, v in bands.items()} == {
        "head": [1], "mid": [2, 3], "tail": [4, 5, 6, 7],
    }  # fmt: skip
    skewed = frequency_bands(np.array([98, 1, 1]))
    assert [len(skewed[k]) for k in ("head", "mid", "tail")] == [1, 0, 2]
