"""Memory the bank needs on each rank, and the refusal to start with too little."""

from __future__ import annotations

import itertools
import math

from trelm_ds.config import Config
from trelm_ds.errors import ConfigError
from trelm_ds.memory.layout import KeyLayout
from trelm_ds.memory.shard_files import FILE_BYTES

# Updates are not deduplicated before they travel, so the owner of a very frequent entity receives
# more than the mean: 1.6 times at 8 ranks and 5.9 times at 64 for Zipf-distributed mentions.
_HOTTEST_OWNER = 6


def required_bytes(
    num_keys: int, hidden_size: int, world_size: int, mentions: int, virtual_shards: int
) -> dict[str, int]:
    """Bytes on the fullest rank at the bank's peak, by part.

    Args:
        num_keys: entities and long-tail words.
        hidden_size: d.
        world_size: ranks.
        mentions: of one rank in one optimizer step, all micro-batches together.
        virtual_shards: the bank is dealt out by; a rank has whole ones.

    Returns:
        ``shard`` (both vectors in float32, count in int64), ``staged`` (fp16 copies until
        the commit), ``exchange`` (buffers of a lookup or a commit, whichever is larger) and
        ``snapshot`` (one file on its way to disk).
    """
    bounds = KeyLayout(num_keys, virtual_shards, world_size).rank_bounds()
    rows = max(end - first for first, end in itertools.pairwise(bounds))
    shard = rows * (2 * 4 * hidden_size + 8)
    lookup = mentions * 3 * 2 * 4 * hidden_size  # answered, received, spread over the mentions
    received = mentions * min(world_size, _HOTTEST_OWNER)
    # A mention is two contributions (window mean and <cls>), sent and received in fp16 and summed
    # in float64.
    commit = 2 * 2 * hidden_size * (2 * mentions + received) + 2 * 8 * hidden_size * received
    return {
        "shard": shard,
        "staged": mentions * 2 * 2 * hidden_size,
        "exchange": max(lookup, commit),
        "snapshot": 2 * min(shard, FILE_BYTES),
    }


def require_memory(
    num_keys: int,
    hidden_size: int,
    world_size: int,
    mentions: int,
    virtual_shards: int,
    max_gib: float | None,
) -> None:
    """Refuses a bank whose shard and buffers exceed ``max_gib`` on a rank; None: no limit.

    Raises:
        ConfigError: with the table of what is needed here and on more ranks.
    """

    def parts_on(ranks: int) -> dict[str, int]:
        return required_bytes(num_keys, hidden_size, ranks, mentions, virtual_shards)

    parts = parts_on(world_size)
    needed = sum(parts.values())
    if max_gib is None or needed <= max_gib * 2**30:
        return
    lines = [f"  {name:<9}{size / 2**30:9.2f} GiB" for name, size in parts.items()]
    for factor in (2, 4, 8):
        more = sum(parts_on(world_size * factor).values())
        lines.append(f"  on {world_size * factor} ranks {more / 2**30:.2f} GiB each")
    raise ConfigError(
        f"memory.max_gib: {max_gib:g} GiB allowed, but a bank of {num_keys} keys x {hidden_size} "
        f"needs {needed / 2**30:.2f} GiB on each of {world_size} ranks:\n" + "\n".join(lines)
    )


def mentions_per_step(config: Config) -> int:
    """Most mentions a rank handles in an optimizer step: the cap K, and as many long-tail words.

    With ``decoding.mentions: all`` there is no cap, and one in four tokens is dense for a text.
    """
    train = config.train
    sequences = train.per_device_train_batch_size * train.gradient_accumulation_steps
    per_sequence = config.injection.max_per_128_tokens * math.ceil(config.data.max_seq_length / 128)
    if config.decoding.enabled and config.decoding.mentions == "all":
        per_sequence = max(per_sequence, config.data.max_seq_length // 4)
    return sequences * 2 * per_sequence
