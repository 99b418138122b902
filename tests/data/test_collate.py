"""A batch holds exactly what its examples hold, padded."""

import numpy as np
import pytest
import torch

from trelm_ds.data.collate import Batch, Collator, Example
from trelm_ds.data.host_sizes import span_positions
from trelm_ds.data.sampling import SampledMentions, no_mentions
from trelm_ds.data.special import SpecialTokens

SPECIAL = SpecialTokens(pad=1, mask=4, cls=2, sep=3, all=(0, 1, 2, 3, 4))


class Names:
    """Two entities, the second without a name; one relation."""

    entity_names = np.array([[10, 11, 12, -1, -1, -1, -1, -1], [-1] * 8], dtype=np.int32)
    relation_names = np.array([[20, 21, 22, 23, 24, 25, 26, 27]], dtype=np.int32)


def example(position, length, targets=(), mentions=None) -> Example:
    ids = np.array([2, *range(30, 30 + length - 2), 3], dtype=np.int32)
    corrupted, is_target = ids.astype(np.int64), np.zeros(length, dtype=bool)
    is_target[list(targets)] = True
    corrupted[is_target] = SPECIAL.mask
    return Example(position, ids, corrupted, is_target, mentions or no_mentions())


def mentions(rows, decode) -> SampledMentions:
    """Rows (left, right, key, injected, role, relation, other) and (row, relation, entity)."""
    m, d = np.array(rows).reshape(-1, 7), np.array(decode, dtype=np.int64).reshape(-1, 3)
    return SampledMentions(m[:, :2], m[:, 2], m[:, 3] > 0, *m[:, 4:].T, *d.T)


def collate(examples, **changes) -> Batch:
    settings = {
        "special": SPECIAL,
        "pad_to_multiple_of": 8,
        "max_length": 32,
        "max_decoded": 8,
        "tables": Names(),
    }
    arrays = Collator(**settings | changes)(examples, np.array([7, 8], dtype=np.int64))
    return Batch.from_numpy(arrays)


def examples() -> list[Example]:
    return [
        example(40, 6, [1, 4], mentions([[2, 4, 0, 1, 1, 0, 1]], [[0, 0, 0], [0, 1, 0]])),
        example(41, 9, []),
        example(42, 4, [2], mentions([[1, 2, 5, 1, 0, 0, 0], [2, 3, 1, 0, 0, 0, 0]], [[1, 1, 0]])),
    ]


def test_every_field():
    batch = collate(examples())
    assert batch.input_ids.shape == (3, 16)
    assert batch.original_ids[0].tolist() == [2, 30, 31, 32, 33, 3] + [1] * 10
    assert batch.input_ids[0].tolist() == [2, 4, 31, 32, 4, 3] + [1] * 10
    assert batch.attention_mask.sum(1).tolist() == [6, 9, 4]
    assert batch.attention_mask[0].tolist() == [1] * 6 + [0] * 10
    assert batch.stream_positions.tolist() == [40, 41, 42]
    assert batch.mlm_positions.tolist() == [1, 4, 34]
    assert batch.mlm_labels.tolist() == [30, 33, 31]
    assert batch.mention_spans.tolist() == [[0, 2, 4], [2, 1, 2], [2, 2, 3]]
    assert batch.mention_keys.tolist() == [0, 5, 1]
    assert batch.mention_injected.tolist() == [True, True, False]
    assert batch.injection_role.tolist() == [1, 0, 0]
    assert batch.injection_other.tolist() == [1, 0, 0]
    assert batch.injected_positions.tolist() == [2, 3, 33]
    assert batch.injected_mentions.tolist() == [0, 1]
    assert batch.injected_row.tolist() == [0, 0, 1]
    assert batch.text_ids.shape == batch.text_mask.shape == (0, 0) and batch.text_tokens == 0
    assert batch.text_index.tolist() == [[0] * 3] * 2
    assert batch.decode_mention.tolist() == [0, 0, 2]
    assert batch.decode_relation.tolist() == [0, 1, 1]
    assert batch.decode_tokens.tolist() == [[10, 11, 12]] * 3
    assert batch.knowledge_positions.tolist() == [2, 3, 34]
    assert batch.knowledge_owner.tolist() == [0, 0, 2]
    assert batch.decoded_width == 2
    assert batch.negatives.tolist() == [7, 8]
    assert batch.counts() == {
        "mlm": 3,
        "objects": 0,
        "cka": 9,
        "entity": 0,
        "tokens": 19,
        "sequences": 3,
        "mentions": 3,
    }
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            kinds = {"mention_injected": torch.bool, "entity_log_q": torch.float32}
            kinds["mlm_mention_given"] = torch.bool
            assert value.dtype == kinds.get(name, torch.int64), name


def test_targets_know_the_masked_mention_they_belong_to():
    first, second, third = example(0, 9, [1, 2, 3, 6]), example(1, 4, [1]), example(2, 6, [1, 3])
    first.masked_mentions = np.array([[2, 4, 7], [6, 7, 5]])
    third.masked_mentions = np.array([[3, 5, 7]])  # its second token is no target
    batch = collate([first, second, third])
    assert batch.mlm_positions.tolist() == [1, 2, 3, 6, 17, 33, 35]
    assert batch.mlm_mention.tolist() == [-1, 7, 7, 5, -1, -1, 7]
    assert batch.mlm_mention_group.tolist() == [-1, 0, 0, 1, -1, -1, 2]
    assert batch.num_mlm_mentions == 3
    assert batch.counts()["objects"] == 4
    batch = collate([second])
    assert batch.mlm_mention.tolist() == batch.mlm_mention_group.tolist() == [-1]
    assert batch.num_mlm_mentions == 0 and batch.mlm_mention_given.tolist() == []


def test_masked_mentions_that_an_injected_triple_of_their_sequence_tells_are_marked():
    rows = [
        [1, 2, 4, 1, 1, 0, 7],  # injected: tells 7
        [2, 3, 4, 0, 1, 0, 5],  # not injected
        [3, 4, 4, 1, 0, 0, 9],  # injected by its own embedding, without a triple
    ]
    first, second = example(0, 12, [5, 6, 7], mentions(rows, [])), example(1, 6, [1])
    first.masked_mentions = np.array([[5, 6, 7], [6, 7, 5], [7, 8, 9]])
    second.masked_mentions = np.array([[1, 2, 7]])  # told in another sequence
    assert collate([first, second]).mlm_mention_given.tolist() == [True, False, False, False]


def test_no_mentions_and_no_targets_keep_every_shape():
    batch = collate([example(0, 4), example(1, 5)])
    assert batch.mention_spans.shape == (0, 3) and batch.decode_tokens.shape == (0, 0)
    assert batch.counts() == {
        "mlm": 0,
        "objects": 0,
        "cka": 0,
        "entity": 0,
        "tokens": 9,
        "sequences": 2,
        "mentions": 0,
    }


@pytest.mark.parametrize("length, multiple, limit, size", [(6, 8, 32, 8), (8, 8, 32, 8),
    (9, 8, 12, 12), (12, 8, 12, 12), (9, 1, 32, 9)])  # fmt: skip
def test_padded_size(length, multiple, limit, size):
    batch = collate([example(0, length)], pad_to_multiple_of=multiple, max_length=limit)
    assert batch.input_ids.shape == (1, size)


def test_names_are_decoded_up_to_the_limit():
    assert collate(examples(), max_decoded=2).decode_tokens.tolist() == [[10, 11]] * 3
    assert collate(examples(), max_decoded=2).counts()["cka"] == 6


def test_texts_for_the_encoder_form():
    row = [[1, 2, 9, 1, 2, 0, 0], [2, 3, 9, 1, 0, 0, 0]]
    batch = collate([example(0, 5, mentions=mentions(row, []))], text_length=10)
    other, relation = batch.text_ids[batch.text_index].tolist()
    assert other == [[2, 10, 11, 12, 3] + [1] * 5, [1] * 10]
    assert relation == [[2, *range(20, 28), 3], [1] * 10]
    assert batch.text_ids.tolist() == [[1] * 10, other[0], relation[0]]  # each text once
    assert batch.text_mask.sum(1).tolist() == [1, 5, 10] and batch.text_tokens == 16
    batch = collate([example(0, 5, mentions=mentions(row, []))], text_length=4)
    assert batch.text_ids[batch.text_index[0]].tolist() == [[2, 10, 11, 3], [1] * 4]
    batch = collate([example(0, 5)], text_length=4)  # no mention, but a row for the encoder
    assert batch.text_ids.tolist() == [[1] * 4] and batch.text_tokens == 1
    assert batch.text_index.shape == (2, 0)


def test_a_mention_whose_answer_has_no_name_is_not_decoded():
    row = [[1, 2, 0, 0, 0, 0, 0], [2, 4, 1, 0, 0, 0, 0]]
    batch = collate([example(0, 6, mentions=mentions(row, [[0, 0, 0], [1, 0, 1]]))])
    assert batch.decode_tokens.tolist() == [[10, 11, 12], [-1] * 3]
    assert batch.knowledge_positions.tolist() == [1] and batch.knowledge_owner.tolist() == [0]
    assert batch.decoded_width == 2


def test_window_tokens_against_a_loop():
    for half_window in (0, 1, 3, 20):
        batch = collate(examples(), half_window=half_window)
        lengths = batch.attention_mask.sum(1).tolist()
        assert batch.window_tokens == sum(
            min(right + half_window, lengths[row]) - max(left - half_window, 0)
            for row, left, right in batch.mention_spans.tolist()
        )


def test_span_positions_against_a_loop():
    spans = np.array([[0, 1, 4], [2, 0, 1], [1, 5, 7]])
    positions, owner = span_positions(spans, 8)
    expected = [
        (row * 8 + column, i)
        for i, (row, left, right) in enumerate(spans.tolist())
        for column in range(left, right)
    ]
    assert list(zip(positions.tolist(), owner.tolist(), strict=True)) == expected
    assert span_positions(spans[:0], 8)[0].shape == (0,)


def test_to_moves_every_tensor():
    moved = collate(examples()).to("meta")
    assert {v.device.type for v in vars(moved).values() if isinstance(v, torch.Tensor)} == {"meta"}
    assert moved.num_tokens == 19
