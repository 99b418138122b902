"""One training sample as bytes: a msgpack map of raw little-endian arrays, fully checked.

The map is ``{"id", "doc", "w", "ids", "spans", "first_span"}``: ``ids`` holds ``w`` bytes per
token (2 or 4), ``spans`` int32 rows (left, right exclusive, key). Raw arrays decode about five
times faster than msgpack lists. Shards may come from anywhere, so every length has a limit
before memory is taken and every value is checked before anyone indexes with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgpack
import numpy as np

from trelm_ds.errors import DataError

# A mention's place in a triple; none: it has no triple in this batch.
ROLE_NONE, ROLE_HEAD, ROLE_TAIL = 0, 1, 2

MAX_SAMPLE_BYTES = 1 << 20
MAX_TOKENS = 4096  # of a sample, specials included
MAX_DOC_CHARACTERS = 200

_FIELDS = {"id": int, "doc": str, "w": int, "ids": bytes, "spans": bytes, "first_span": int}


@dataclass
class Sample:
    """A sequence with its linked mentions.

    Attributes:
        id: global index in the split.
        doc: name of the document the text is from, at most 200 characters.
        ids: int32 [length] token ids, [CLS] and [SEP] included.
        spans: int32 [m, 3] rows (left, right exclusive, key), sorted by left, disjoint, inside
            the special tokens. A key below the number of entities is an entity index, the keys
            above are long-tail words.
        first_span: index of ``spans[0]`` among the spans of the split (row of the score tables).
    """

    id: int
    doc: str
    ids: np.ndarray
    spans: np.ndarray
    first_span: int


def _check_spans(spans: np.ndarray, length: int, num_keys: int | None) -> None:
    if not len(spans):
        return
    left, right, key = spans.T
    if (left < 1).any() or (right > length - 1).any() or (left >= right).any():
        raise DataError(f"a span lies outside 1..{length - 1} or is empty")
    if (left[1:] < right[:-1]).any():
        raise DataError("spans overlap or are not sorted by their left end")
    if (key < 0).any() or (num_keys is not None and (key >= num_keys).any()):
        raise DataError(f"a span's key is outside 0..{num_keys - 1 if num_keys else 'max'}")


def encode_sample(sample: Sample) -> bytes:
    """The sample's msgpack form.

    Raises:
        DataError: a field is not what ``decode_sample`` would accept (vocabulary and number of
            keys are not known here).
    """
    ids, spans = np.asarray(sample.ids), np.asarray(sample.spans).reshape(-1, 3)
    if ids.ndim != 1 or len(ids) < 2 or ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise DataError(f"document {sample.doc!r}: token ids must be two or more, none negative")
    if len(sample.doc) > MAX_DOC_CHARACTERS:
        raise DataError(
            f"document {sample.doc[:40]!r}...: name over {MAX_DOC_CHARACTERS} characters"
        )
    _check_spans(spans, len(ids), None)
    width = 2 if ids.max() < 1 << 16 else 4
    data = msgpack.packb(
        {
            "id": int(sample.id),
            "doc": sample.doc,
            "w": width,
            "ids": ids.astype("<u2" if width == 2 else "<i4").tobytes(),
            "spans": spans.astype("<i4").tobytes(),
            "first_span": int(sample.first_span),
        }
    )
    if len(data) > MAX_SAMPLE_BYTES:
        raise DataError(f"document {sample.doc!r}: sample over {MAX_SAMPLE_BYTES} bytes")
    return data


def decode_sample(data: bytes, *, max_length: int, vocab_size: int, num_keys: int) -> Sample:
    """Reads and checks one sample; nothing in ``data`` is trusted.

    Args:
        data: msgpack bytes, at most 1 MiB.
        max_length: most tokens a sequence may have, specials included.
        vocab_size: token ids lie below it.
        num_keys: entities plus long-tail words; span keys lie below it.
    Raises:
        DataError: any field is missing, extra, of the wrong type or out of range.
    """
    if len(data) > MAX_SAMPLE_BYTES:
        raise DataError(f"sample of {len(data)} bytes; the limit is {MAX_SAMPLE_BYTES}")
    try:
        fields = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=4 * MAX_DOC_CHARACTERS,
            max_bin_len=12 * max_length,  # a span of one token each is the most
            max_array_len=0,
            max_map_len=len(_FIELDS),
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise DataError(f"not a msgpack sample: {type(error).__name__} {error}") from None
    if type(fields) is not dict or set(fields) != set(_FIELDS):
        raise DataError(f"not a map of {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if type(fields[name]) is not kind:  # bool is an int to isinstance
            raise DataError(f"field {name!r} is not of type {kind.__name__}")
    for name in ("id", "first_span"):
        if not 0 <= fields[name] < 1 << 62:
            raise DataError(f"field {name!r} is out of range: {fields[name]}")
    if len(fields["doc"]) > MAX_DOC_CHARACTERS:
        raise DataError(f"field 'doc' is over {MAX_DOC_CHARACTERS} characters")
    width = fields["w"]
    if width not in (2, 4):
        raise DataError(f"field 'w' is {width}, not 2 or 4")
    if len(fields["ids"]) % width:
        raise DataError(f"field 'ids' is not a whole number of {width}-byte ids")
    ids = np.frombuffer(fields["ids"], "<u2" if width == 2 else "<i4").astype(np.int32)
    if not 2 <= len(ids) <= max_length:
        raise DataError(f"{len(ids)} tokens, not 2 to {max_length}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise DataError(f"a token id is outside 0..{vocab_size - 1}")
    if len(fields["spans"]) % 12:
        raise DataError("field 'spans' is not a whole number of int32 triples")
    spans = np.frombuffer(fields["spans"], "<i4").astype(np.int32).reshape(-1, 3)
    _check_spans(spans, len(ids), num_keys)
    return Sample(fields["id"], fields["doc"], ids, spans, fields["first_span"])
