"""Where a memory key lives: affine hash to a slot, slots to virtual shards, shards to ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from trelm_ds.errors import ConfigError

# Keys are numbered by frequency in most corpora, so contiguous ranges of keys would put nearly all
# the traffic on one rank. An affine map modulo the number of keys spreads them, is a bijection and
# needs no table. The multiplier is Knuth's, floor(2^32 / golden ratio).
_MULTIPLIER = 2654435761
_OFFSET = 1000003


@dataclass(frozen=True)
class KeyLayout:
    """slot = (multiplier * key + offset) mod num_keys; virtual shards are runs of slots.

    Every rank owns a run of virtual shards, therefore a run of slots. Files and digests are made
    of virtual shards, which do not depend on the number of ranks.
    """

    num_keys: int
    virtual_shards: int
    world_size: int = 1
    multiplier: int = field(init=False)
    offset: int = field(init=False)

    def __post_init__(self):
        # The products below stay under 2^63 as long as the keys fit in 31 bits.
        if not 1 <= self.num_keys < 2**31:
            raise ConfigError(f"memory bank: {self.num_keys} keys, expected 1 to 2^31 - 1")
        if self.virtual_shards < 1:
            raise ConfigError(f"memory.virtual_shards: {self.virtual_shards} must be at least 1")
        multiplier = _MULTIPLIER % self.num_keys
        while math.gcd(multiplier, self.num_keys) != 1:
            multiplier += 1
        object.__setattr__(self, "multiplier", multiplier)
        object.__setattr__(self, "offset", _OFFSET % self.num_keys)

    def slots(self, keys: Tensor) -> Tensor:
        """The slots of ``keys`` (int64, any shape, each in [0, num_keys))."""
        return (keys * self.multiplier + self.offset) % self.num_keys

    def keys(self, slots: Tensor) -> Tensor:
        """The inverse of :meth:`slots`."""
        return (slots - self.offset) * pow(self.multiplier, -1, self.num_keys) % self.num_keys

    def first_slot(self, shard: int) -> int:
        """The first slot of a virtual shard; shard ``virtual_shards`` gives the end."""
        return self.num_keys * shard // self.virtual_shards

    def shards_of(self, rank: int) -> range:
        """The virtual shards that ``rank`` owns."""
        return range(
            self.virtual_shards * rank // self.world_size,
            self.virtual_shards * (rank + 1) // self.world_size,
        )

    def rank_bounds(self) -> list[int]:
        """``world_size + 1`` slots: rank r owns slots [bounds[r], bounds[r + 1])."""
        starts = [self.first_slot(self.shards_of(rank).start) for rank in range(self.world_size)]
        return [*starts, self.num_keys]
