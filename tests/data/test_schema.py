"""The sample codec gives back what it took, and refuses everything else with one clear line."""

import msgpack
import numpy as np
import pytest

from trelm_ds.data.schema import MAX_SAMPLE_BYTES, Sample, decode_sample, encode_sample
from trelm_ds.errors import DataError

LIMITS = {"max_length": 16, "vocab_size": 100, "num_keys": 10}


def sample(**changes) -> Sample:
    fields = {
        "id": 7,
        "doc": "Ælfrič",
        "ids": np.array([2, 5, 99, 6, 7, 3], dtype=np.int32),
        "spans": np.array([[1, 3, 9], [3, 5, 0]], dtype=np.int32),
        "first_span": 12,
    }
    return Sample(**fields | changes)


def packed(**changes) -> bytes:
    """The fields of ``sample()`` as the codec packs them, some replaced, None removed."""
    fields = msgpack.unpackb(encode_sample(sample())) | changes
    return msgpack.packb({k: v for k, v in fields.items() if v is not None})


def assert_equal(a: Sample, b: Sample) -> None:
    assert (a.id, a.doc, a.first_span) == (b.id, b.doc, b.first_span)
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.spans, b.spans)
    assert a.ids.dtype == a.spans.dtype == np.int32 and a.spans.shape[1:] == (3,)


@pytest.mark.parametrize(
    "changes, width",
    [
        ({}, 2),
        ({"spans": np.zeros((0, 3), np.int32), "doc": ""}, 2),
        ({"ids": np.array([2, 65535, 3], np.int32), "spans": np.array([[1, 2, 1]])}, 2),
        ({"ids": np.array([2, 65536, 3], np.int32), "spans": np.array([[1, 2, 1]])}, 4),
    ],
)
def test_round_trip(changes, width):
    data = encode_sample(sample(**changes))
    assert msgpack.unpackb(data)["w"] == width
    assert_equal(decode_sample(data, **LIMITS | {"vocab_size": 70000}), sample(**changes))


def spans(*rows) -> bytes:
    return np.array(rows, dtype="<i4").tobytes()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not a msgpack sample"),
        (b"\xc1", "not a msgpack sample"),
        (packed()[:-1], "not a msgpack sample"),
        (packed() + b"\x00", "not a msgpack sample"),
        (b"\x00" * (MAX_SAMPLE_BYTES + 1), "the limit is"),
        (b"\xdd\xff\xff\xff\xff", "not a msgpack sample"),  # an array of 4 G entries
        (b"\xdf\xff\xff\xff\xff", "not a msgpack sample"),  # a map of 4 G entries
        (b"\xc6\xff\xff\xff\xff", "not a msgpack sample"),  # 4 GB of bytes
        (b"\x81\xa1a" * 5000 + b"\x01", "not a msgpack sample"),  # nested beyond the stack
        (msgpack.packb(msgpack.ExtType(4, b"x")), "not a msgpack sample"),
        (msgpack.packb({1: 2}), "not a msgpack sample"),
        (msgpack.packb(3), "not a map"),
        (packed(doc=None), "not a map of"),
        (packed(extra=1), "not a msgpack sample"),
        (packed(doc=b"bytes"), "'doc' is not of type str"),
        (packed(doc="x" * 201), "over 200 characters"),
        (packed(doc="x" * 5000), "not a msgpack sample"),
        (packed(id=True), "'id' is not of type int"),
        (packed(id=1.0), "'id' is not of type int"),
        (packed(id=-1), "'id' is out of range"),
        (packed(first_span=-1), "'first_span' is out of range"),
        (packed(first_span=1 << 63), "'first_span' is out of range"),
        (packed(w=3), "'w' is 3"),
        (packed(ids="text"), "'ids' is not of type bytes"),
        (packed(ids=b"\x01"), "whole number of 2-byte ids"),
        (packed(ids=b""), "0 tokens"),
        (packed(ids=b"\x01\x00" * 17), "17 tokens"),
        (packed(ids=b"\x01\x00" * 200), "not a msgpack sample"),
        (packed(ids=np.array([2, 100, 5, 5, 5, 3], "<u2").tobytes()), "token id is outside 0..99"),
        (packed(w=4, ids=np.array([2, -1, 5, 5, 5, 3], "<i4").tobytes()), "token id is outside"),
        (packed(spans=b"\x00" * 13), "whole number of int32 triples"),
        (packed(spans=spans([0, 2, 1])), "span lies outside 1..5"),
        (packed(spans=spans([1, 6, 1])), "span lies outside"),
        (packed(spans=spans([2, 2, 1])), "span lies outside"),
        (packed(spans=spans([-5, 2, 1])), "span lies outside"),
        (packed(spans=spans([1, 2**31 - 1, 1])), "span lies outside"),
        (packed(spans=spans([1, 3, 1], [2, 4, 1])), "overlap or are not sorted"),
        (packed(spans=spans([3, 4, 1], [1, 2, 1])), "overlap or are not sorted"),
        (packed(spans=spans([1, 2, 10])), "key is outside 0..9"),
        (packed(spans=spans([1, 2, -1])), "key is outside 0..9"),
    ],
)
def test_hostile_input_is_refused(data, message):
    with pytest.raises(DataError, match=message) as caught:
        decode_sample(data, **LIMITS)
    assert "\n" not in str(caught.value)


def test_random_damage_never_gets_past_the_checks():
    """Whatever a flipped byte does, the result is a DataError or a sample within the limits."""
    data = bytearray(encode_sample(sample()))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] = rng.integers(256)
        try:
            result = decode_sample(bytes(damaged), **LIMITS)
        except DataError:
            refused += 1
            continue
        assert result.ids.max() < 100 and result.spans[:, 2].max() < 10
        assert result.spans[:, :2].min() >= 1 and result.spans[:, 1].max() <= len(result.ids) - 1
    assert 500 < refused < 2000


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": np.array([2])},
        {"ids": np.array([2, -1, 3])},
        {"doc": "x" * 201},
        {"spans": np.array([[0, 2, 1]])},
        {"spans": np.array([[1, 2, -1]])},
        {"ids": np.zeros(600_000, np.int32)},
    ],
)
def test_encoding_refuses_what_decoding_would(changes):
    with pytest.raises(DataError):
        encode_sample(sample(**changes))
