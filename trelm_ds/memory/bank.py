"""The knowledge-augmented memory bank, sharded over the ranks (Eqs. 5 and 6).

Contract, for every key (an entity or a long-tail word):

* All micro-batches of optimizer step t read the state committed by step t - 1.
* State changes in :meth:`MemoryBank.commit` alone, once per applied step; a skipped step calls
  :meth:`MemoryBank.drop`. ``version`` counts commits, and a step is never applied twice.
* The state does not depend on the number of ranks, on micro-batching or on the order in which
  mentions arrive, bit by bit: contributions travel as fp16 and are summed in float64, which is
  exact (fp16 values are multiples of 2^-24 below 2^16: 2^13 of the largest fit in 53 bits), and
  everything after the sums is computed by the one owner of the key.
* Both vectors are stored in float32: a running mean kept in fp16 is off by 1% after 10^4 updates.
* ``lookup``, ``commit``, ``load_shards``, ``digest`` and ``visited`` are collective: every rank
  calls them, with empty tensors if it has no mention.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from trelm_ds.config import MemoryConfig
from trelm_ds.errors import CheckpointError, ConfigError, DataError, TrelmError
from trelm_ds.memory.layout import KeyLayout
from trelm_ds.memory.shard_files import FILE_BYTES, open_snapshot, shard_digest, write_shard_file

logger = logging.getLogger(__name__)

_FP16_MAX = torch.finfo(torch.float16).max
# Slots updated at a time. On a CPU float64 temporaries of more than a few MiB cost ten times their
# arithmetic in page faults; on a GPU more blocks mean more kernel launches.
_CPU_BLOCK, _GPU_BLOCK = 128, 8192
_INITIALISE_CHUNK = 16384


@dataclass
class MemoryRows:
    """What the bank remembers of M mentions; row i belongs to the i-th key asked for.

    Attributes:
        local: float32 [M, d], Eq. 5.
        global_: float32 [M, d], Eq. 6; equal to ``local`` before the key's first visit.
    """

    local: Tensor
    global_: Tensor


class MemoryBank:
    """Local and global memory of ``num_keys`` keys, each rank holding a share.

    Args:
        num_keys: entities, then long-tail words.
        hidden_size: d.
        config: discount (gamma), ema, virtual_shards.
        process_group: of all ranks; None: the default group, or a single rank where
            torch.distributed is not initialised. A bank on the CPU needs a gloo group, one on
            a GPU an NCCL group.
        device: where the rank's share lives.
        control: host-side group of the same ranks, over which they tell each other how many rows
            come: a lookup then waits for no GPU. None: ``process_group`` does.

    Attributes:
        version: commits applied so far.
        rejected_rows: non-finite contributions refused by commits of this process, all ranks.
        max_rejected_rows: a commit that would exceed it raises.
    """

    def __init__(
        self,
        num_keys: int,
        hidden_size: int,
        config: MemoryConfig,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        control: dist.ProcessGroup | None = None,
    ):
        self.device = torch.device(device)
        self.group, self._control = process_group, control
        self.rank, world_size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank = dist.get_rank(process_group)
            world_size = dist.get_world_size(process_group)
        if world_size > 1:
            backend = dist.get_backend(process_group)
            wrong = {"cpu": "nccl", "cuda": "gloo"}.get(self.device.type)
            if backend == wrong:
                raise ConfigError(
                    f"memory.device: a bank on {self.device.type} cannot use the {backend} "
                    "process group of this run; pass it a group of its own"
                )
        self.config = config
        self.hidden_size = hidden_size
        self.layout = KeyLayout(num_keys, config.virtual_shards, world_size)
        bounds = self.layout.rank_bounds()
        self._bounds = torch.tensor(bounds)
        self._first, end = bounds[self.rank], bounds[self.rank + 1]
        self._rows = torch.zeros(end - self._first, 2, hidden_size, device=self.device)
        self._count = torch.zeros(end - self._first, dtype=torch.int64, device=self.device)
        self._staged: list[tuple[Tensor, ...]] = []
        self.version = 0
        self.rejected_rows = 0
        self.max_rejected_rows = 1000

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's share: both vectors and the count of every key it owns."""
        return self._rows.nbytes + self._count.nbytes

    def initialise(self, rows_fn: Callable[[Tensor], Tensor]) -> None:
        """Fills local memory from the keys' names and forgets all visits.

        Global memory starts as a copy: before the first visit local memory stands in for it, and
        the first visit replaces it, for it weighs ``count`` = 0 in the running mean.

        Args:
            rows_fn: keys int64 [n] on the CPU -> float [n, d], finite. A row may depend on its
                key alone, because the chunks differ between numbers of ranks.

        Raises:
            DataError: a row is not finite.
        """
        for low in range(0, len(self._rows), _INITIALISE_CHUNK):
            high = min(low + _INITIALISE_CHUNK, len(self._rows))
            keys = self.layout.keys(torch.arange(self._first + low, self._first + high))
            rows = rows_fn(keys).detach().to(self.device, torch.float32)
            finite = rows.isfinite().all(1).cpu()
            if not finite.all():
                raise DataError(
                    f"memory bank: the initial row of key {int(keys[~finite][0])} is not finite"
                )
            self._rows[low:high] = rows[:, None]
        self._count.zero_()
        self._staged.clear()
        self.version = 0

    def lookup(self, keys: Tensor, device: torch.device | str | None = None) -> MemoryRows:
        """The rows of ``keys`` as of the last commit; collective.

        Rows travel as float32, so the answer does not depend on the number of ranks.

        Args:
            keys: int64 [M], repeats welcome: each distinct key travels once per rank. Keys on the
                CPU are counted there, and no GPU is waited for.
            device: where the answer goes; None: where ``keys`` are.

        Returns:
            On ``device``.

        Raises:
            DataError: a key of this rank is out of range.
        """
        device = keys.device if device is None else torch.device(device)
        slots = self.layout.slots(self._in_range(keys))
        asked, inverse = torch.unique(slots, return_inverse=True)  # sorted, hence by owner
        send = self._per_owner(asked)
        receive = self._exchange_counts(send)
        asked, inverse = _send(asked, self.device), _send(inverse, self.device)
        mine = self._exchange(asked, send, receive) - self._first
        rows = self._exchange(self._rows.index_select(0, mine), receive, send)
        rows = _send(rows.index_select(0, inverse), device)
        return MemoryRows(local=rows[:, 0], global_=rows[:, 1])

    def stage(self, keys: Tensor, sequence_ids: Tensor, local: Tensor, cls: Tensor) -> None:
        """Keeps a micro-batch's contributions until the step's commit; not collective.

        Rows are kept as fp16, clipped to its finite range, on the device that they come from: a
        bank on the CPU fetches them at the commit, once a step. All mentions of one sequence must
        be staged by one rank: a (sequence, key) pair is counted once per rank.

        Args:
            keys: int64 [M]; they and ``sequence_ids`` on any device, all micro-batches alike.
            sequence_ids: int64 [M], the global stream position of the mention's sequence.
            local: float [M, d], Eq. 4.
            cls: float [M, d], last-layer state of the sequence's first token; equal for all
                mentions of a sequence.
        """
        shape = (len(keys), self.hidden_size)
        if len(sequence_ids) != len(keys) or local.shape != shape or cls.shape != shape:
            raise ValueError(
                f"stage: {len(keys)} keys, {len(sequence_ids)} sequence ids, "
                f"local {tuple(local.shape)}, cls {tuple(cls.shape)}; expected rows {shape}"
            )
        # Clipping would hide an infinity, so finiteness is judged first (the extremes carry NaN
        # on); the rows are taken out at the commit, where the device is waited for anyway.
        extremes = [x.detach() for x in (local.amax(1), local.amin(1), cls.amax(1), cls.amin(1))]
        finite = torch.stack(extremes).isfinite().all(0)
        rows = torch.stack([local.detach().half(), cls.detach().half()], 1)
        rows.clamp_(-_FP16_MAX, _FP16_MAX)
        self._staged.append((keys, sequence_ids, finite, rows))

    def drop(self) -> None:
        """Forgets the staged contributions of a skipped step; every rank must call it."""
        self._staged.clear()

    @torch.no_grad()
    def commit(self, step: int) -> None:
        """Applies the staged contributions of all ranks as one step; collective.

        Local memory (Eq. 5), m mentions x of a key in the step, discount g:
        ``per_occurrence``: M <- (1-g)^m M + (1-(1-g)^m) mean(x), which is Eq. 5 applied m times,
        averaged over all orders of the mentions; ``per_step``: M <- (1-g) M + g mean(x).
        Global memory (Eq. 6): running mean of <cls> over distinct (sequence, key) pairs.

        Args:
            step: must be ``version + 1``.

        Raises:
            ValueError: on all ranks, nothing applied: on some rank ``step`` is not the next one.
            TrelmError: on all ranks, nothing applied: more than ``max_rejected_rows``
                non-finite contributions so far.
            RuntimeError: on all ranks, nothing applied: contributions were lost on the way.
            DataError: a key of this rank is out of range.
        """
        ids, rows, rejected = self._contributions()
        send = self._per_owner(ids // 2)
        receive = self._exchange_counts(send)
        # The verdict is reduced before any row moves: gloo answers split sizes that disagree with
        # silent success on one side, and a rank that raised alone would leave the others waiting.
        late, sent, received, rejected = self._sum_over_ranks(
            [int(step != self.version + 1), len(ids), sum(receive), rejected]
        )
        if late:
            raise ValueError(
                f"memory bank at version {self.version} cannot commit step {step}: steps are "
                "committed once each and in order, on all ranks alike"
            )
        if sent != received:
            raise RuntimeError(f"memory bank: {sent} rows sent, {received} expected by owners")
        if self.rejected_rows + rejected > self.max_rejected_rows:
            raise TrelmError(
                f"memory bank: {self.rejected_rows + rejected} non-finite rows rejected "
                f"(limit {self.max_rejected_rows}); the model's states have overflowed, lower "
                "train.learning_rate"
            )
        self._staged.clear()
        ids, rows = self._exchange(ids, send, receive), self._exchange(rows, send, receive)
        self._apply(ids, rows)
        self.rejected_rows += rejected
        self.version = step

    def visited(self) -> int:
        """Number of keys visited at least once, over all ranks; collective."""
        return self._sum_over_ranks([int((self._count > 0).sum())])[0]

    def digest(self) -> str:
        """sha256 of version and content, the same for any number of ranks; collective."""
        owned = self.layout.shards_of(self.rank)
        table = torch.zeros(self.layout.virtual_shards, 32, dtype=torch.int32)
        for shard in owned:
            part = self._shard_slice(shard, shard + 1)
            content = bytes.fromhex(shard_digest(self._rows[part], self._count[part]))
            table[shard] = torch.tensor(list(content), dtype=torch.int32)
        if self.layout.world_size > 1:
            table = table.to(self.device)
            dist.all_reduce(table, group=self.group)
        head = f"{self.version} {self.layout.num_keys} {self.hidden_size} "
        return hashlib.sha256(head.encode() + bytes(table.flatten().tolist())).hexdigest()

    def save_shards(self, folder: str | Path) -> list[Path]:
        """Writes this rank's share into ``folder`` (existing, without another snapshot's files).

        Every rank writes its own files, named by their virtual shards. Publishing them together
        (fsync, manifest, rename) is the checkpoint's job.

        Returns:
            The paths written.
        """
        if self._staged:
            raise RuntimeError("memory bank: save between a step's commit and the next stage")
        owned = self.layout.shards_of(self.rank)
        slots_per_file = FILE_BYTES // (8 * self.hidden_size + 8)
        per_file = max(1, slots_per_file * self.layout.virtual_shards // self.layout.num_keys)
        paths = []
        for first in range(owned.start, owned.stop, per_file):
            shards = range(first, min(first + per_file, owned.stop))
            part = self._shard_slice(shards.start, shards.stop)
            rows, count = self._rows[part], self._count[part]
            paths.append(
                write_shard_file(Path(folder), self.layout, self.version, shards, rows, count)
            )
        return paths

    def load_shards(self, folder: str | Path) -> None:
        """Restores a snapshot written by any number of ranks; collective.

        Each rank reads the virtual shards it owns from whichever files hold them.

        Raises:
            CheckpointError: on all ranks: missing, incomplete, corrupt, or of another bank. The
                bank's content is then undefined until the next successful load.
        """
        error = None
        try:
            version = self._read_snapshot(folder)
        except CheckpointError as caught:
            error = caught
        if self._sum_over_ranks([int(error is not None)])[0]:
            raise error or CheckpointError(f"{folder}: another rank could not read its share")
        self._staged.clear()
        self.version = version

    def _read_snapshot(self, folder: str | Path) -> int:
        files = open_snapshot(folder)
        head = files[0]
        for name, saved, asked in (
            ("keys", head.num_keys, self.layout.num_keys),
            ("hidden size", head.hidden_size, self.hidden_size),
            ("virtual shards", head.virtual_shards, self.layout.virtual_shards),
        ):
            if saved != asked:
                raise CheckpointError(
                    f"{folder}: the memory bank was saved with {saved} {name}, this run has {asked}"
                )
        owned = self.layout.shards_of(self.rank)
        for file in files:
            wanted = range(max(file.first, owned.start), min(file.end, owned.stop))
            for shard, rows, count in file.read(wanted) if wanted else ():
                part = self._shard_slice(shard, shard + 1)
                self._rows[part] = rows.to(self.device)
                self._count[part] = count.to(self.device)
        return head.version

    def _shard_slice(self, first: int, end: int) -> slice:
        """Rows of this rank that hold virtual shards [first, end)."""
        return slice(
            self.layout.first_slot(first) - self._first, self.layout.first_slot(end) - self._first
        )

    def _in_range(self, keys: Tensor) -> Tensor:
        # The hash would map a key that is out of range onto another one's slot.
        if len(keys):
            low, high = torch.stack(keys.aminmax()).tolist()
            if low < 0 or high >= self.layout.num_keys:
                raise DataError(
                    f"memory bank: keys {low} to {high} asked for, "
                    f"expected 0 to {self.layout.num_keys - 1}"
                )
        return keys

    def _contributions(self) -> tuple[Tensor, Tensor, int]:
        """What the staged mentions contribute, sorted by slot and hence by owner.

        Returns:
            ids int64 [n]: 2 * slot for a window mean, 2 * slot + 1 for a <cls> state, of which
            each distinct (sequence, key) pair has one; rows fp16 [n, d]; the number of mentions
            rejected on this rank.
        """
        if not self._staged:
            ids = torch.empty(0, dtype=torch.int64, device=self.device)
            rows = torch.empty(0, self.hidden_size, dtype=torch.float16, device=self.device)
            return ids, rows, 0
        keys, sequences, finite, rows = (
            _send(torch.cat(x), self.device) for x in zip(*self._staged, strict=True)
        )
        self._in_range(keys)
        kept = finite.nonzero().squeeze(1)
        rejected = len(keys) - len(kept)
        if rejected:
            named = torch.unique(keys[~finite])[:10].tolist()
            logger.warning("memory bank: %d non-finite rows rejected, keys %s", rejected, named)
        slots = self.layout.slots(keys[kept])
        sequence = torch.unique(sequences[kept], return_inverse=True)[1]
        pair, order = torch.sort(slots * (len(slots) + 1) + sequence, stable=True)
        first = order[torch.diff(pair, prepend=pair.new_full((1,), -1)) != 0]
        ids, order = torch.sort(torch.cat([2 * slots, 2 * slots[first] + 1]))
        source = torch.cat([2 * kept, 2 * kept[first] + 1])[order]
        return ids, rows.view(-1, self.hidden_size).index_select(0, source), rejected

    def _apply(self, ids: Tensor, rows: Tensor) -> None:
        """Updates this rank's share with every contribution to it, in any order."""
        ids, order = torch.sort(ids)
        unique, inverse, number = torch.unique_consecutive(
            ids, return_inverse=True, return_counts=True
        )
        # A visited key has at least one window mean and one <cls> state.
        if len(unique) % 2 or not torch.equal(unique[::2] + 1, unique[1::2]):
            raise RuntimeError("memory bank: the contributions received do not pair up")
        slots = unique[::2] // 2 - self._first
        mentions, pairs = number[::2], number[1::2]
        kept = self._kept_share(mentions)
        starts = [0, *number.cumsum(0)[1::2].tolist()]  # of each slot's contributions
        block = _CPU_BLOCK if self.device.type == "cpu" else _GPU_BLOCK
        for low in range(0, len(slots), block):
            high = min(low + block, len(slots))
            part = slice(starts[low], starts[high])
            sums = torch.zeros(
                2 * (high - low), self.hidden_size, dtype=torch.float64, device=self.device
            )
            sums.index_add_(0, inverse[part] - 2 * low, rows[order[part]].double())
            self._update(
                slots[low:high],
                kept[low:high, None],
                sums[::2] / mentions[low:high, None],
                sums[1::2],
                pairs[low:high],
            )

    def _update(
        self, slots: Tensor, kept: Tensor, local_mean: Tensor, cls_sum: Tensor, pairs: Tensor
    ) -> None:
        """Eqs. 5 and 6 on distinct slots of this rank, in float64."""
        old, count = self._rows[slots].double(), self._count[slots]
        # Plain products and sums only: fused forms (lerp, addcmul, add with alpha) round
        # differently in vectorised loops and in their tails, that is by a row's position.
        local = kept * old[:, 0] + (1 - kept) * local_mean
        total = count + pairs
        global_ = (count[:, None] * old[:, 1] + cls_sum) / total[:, None]
        self._rows[slots] = torch.stack([local, global_], 1).float()
        self._count[slots] = total

    def _kept_share(self, mentions: Tensor) -> Tensor:
        """float64 [n], the weight of the old local memory after m mentions."""
        keep = 1 - self.config.discount
        if self.config.ema == "per_step":
            return torch.full_like(mentions, keep, dtype=torch.float64)
        # Powers by Python: the device's differ between CPU and GPU in the last bit.
        distinct, inverse = torch.unique(mentions, return_inverse=True)
        powers = [keep**m for m in distinct.tolist()]
        return torch.tensor(powers, dtype=torch.float64, device=self.device)[inverse]

    def _per_owner(self, slots: Tensor) -> list[int]:
        """How many of ``slots`` (sorted) each rank owns."""
        cuts = torch.searchsorted(slots, _send(self._bounds, slots.device))
        return torch.diff(cuts).tolist()

    def _exchange_counts(self, send: list[int]) -> list[int]:
        if self.layout.world_size == 1:
            return send
        group, device = self._control, torch.device("cpu")
        if group is None:
            group, device = self.group, self.device
        outgoing = torch.tensor(send, device=device)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=group)
        return incoming.tolist()

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Rows (ordered by destination) to their owners; rows of all ranks come back."""
        if self.layout.world_size == 1:
            return rows
        incoming = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(incoming, rows.contiguous(), receive, send, group=self.group)
        return incoming

    def _sum_over_ranks(self, values: list[int]) -> list[int]:
        if self.layout.world_size == 1:
            return values
        total = torch.tensor(values, device=self.device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; a GPU gets it in its own time, the CPU waits until it is there."""
    return tensor.to(device, non_blocking=device.type != "cpu")
