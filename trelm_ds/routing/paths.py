"""Paths: which FFN neurons a step updates, and the rules that choose them (TRELM Eq. 12).

``S_mid`` is a set of intermediate neurons per layer. With ``paths: full`` there are also
``S_in`` and ``S_out``, entries of the FFN's input and output vectors, and what is updated is
W1[S_mid, S_in], b1[S_mid], W2[S_out, S_mid], b2[S_out] (Hugging Face's orientation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from trelm_ds import ops


@dataclass
class PathScores:
    """Scores of one layer ([f], [d], [d]) or of all layers ([L, f], [L, d], [L, d])."""

    mid: torch.Tensor
    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Those that exist, in a fixed order, for collectives."""
        return [t for t in (self.mid, self.inputs, self.outputs) if t is not None]

    def of_layer(self, layer: int) -> PathScores:
        """The scores of one layer out of those of all layers."""
        fields = (self.mid, self.inputs, self.outputs)
        return PathScores(*(None if t is None else t[layer] for t in fields))


@dataclass
class LayerPaths:
    """The paths of one layer: int64 indices, ascending, on the layer's device.

    ``start`` is set when the rows are one contiguous block, so that matrices are viewed instead
    of gathered and nothing has to be read back from the device to find that out.

    How many indices a selection keeps is data. On a GPU it lists a fixed number all the same, so
    that no layer's backward waits, and ``*_used`` says which of them are on the path: what belongs
    to the others gets a gradient of zero, like all that is not listed.
    """

    rows: torch.Tensor  # S_mid, [k]
    inputs: torch.Tensor | None = None  # S_in, with paths: full
    outputs: torch.Tensor | None = None  # S_out, with paths: full
    start: int | None = None
    rows_used: torch.Tensor | None = None  # bool [k]; None: all of them
    inputs_used: torch.Tensor | None = None
    outputs_used: torch.Tensor | None = None

    @classmethod
    def block(cls, start: int, size: int, device) -> LayerPaths:
        return cls(torch.arange(start, start + size, device=device), start=start)

    def take(self, matrix: torch.Tensor, dim: int) -> torch.Tensor:
        """The path's rows or columns of ``matrix``: a view of a block, a copy otherwise."""
        if self.start is not None:
            return matrix.narrow(dim, self.start, len(self.rows))
        return matrix.index_select(dim, self.rows)

    def kept(self, which: str, size: int) -> torch.Tensor:
        """Bool [size], True on the path; on the device, or on the CPU for a block.

        Args:
            which: ``rows``, ``inputs`` or ``outputs``.
            size: f, d or d.
        """
        if self.start is not None:
            mask = torch.zeros(size, dtype=torch.bool)
            mask[self.start : self.start + len(self.rows)] = True
            return mask
        index, used = getattr(self, which), getattr(self, f"{which}_used")
        if used is None:
            used = torch.ones_like(index, dtype=torch.bool)
        return used.new_zeros(size).index_copy_(0, index, used)

    def compact(self) -> LayerPaths:
        """The same paths, without indices that are not on them. Waits for the device."""
        sides = ((self.rows, self.rows_used), (self.inputs, self.inputs_used))
        sides += ((self.outputs, self.outputs_used),)
        indices = [index if used is None else index[used] for index, used in sides]
        return LayerPaths(*indices, start=self.start)

    def only_used(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` [..., k] of the listed neurons, with zeros for those not on the path."""
        return values if self.rows_used is None else values.masked_fill(~self.rows_used, 0)

    def weight_grad(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        columns: torch.Tensor | None,
        size: int,
        columns_used: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """left^T right [size, d], spread from the path's rows (and columns); zero elsewhere.

        Args:
            left: float [N, k], columns of the path's neurons only.
            right: float [N, d].
            columns: int64 [c], the columns listed, or None for all of them; blocks keep all.
            size: f, rows of the result.
            columns_used: bool [c], which of them are on the path; None: all.
        """
        if self.start is not None:  # the product goes straight to its place
            out = right.new_empty(size, right.shape[1])
            stop = self.start + len(self.rows)
            out[: self.start].zero_()
            out[stop:].zero_()
            torch.mm(left.t(), right, out=out[self.start : stop])
            return out
        out = right.new_zeros(size, right.shape[1])
        if columns is not None:
            right = right.index_select(1, columns)
        path = left.t() @ right
        if self.rows_used is not None:
            path.masked_fill_(~self.rows_used[:, None], 0)
        if columns_used is not None:
            path.masked_fill_(~columns_used, 0)
        if columns is not None:
            out[self.rows[:, None], columns] = path
        else:
            out.index_copy_(0, self.rows, path)
        return out


def kept_count(size: int, fraction: float, multiple_of: int) -> int:
    """rho * size, rounded up to a multiple of ``multiple_of``; at least 1, at most ``size``."""
    wanted = max(1, math.ceil(round(fraction * size, 6)))  # .1 * 30 is not 3 in floating point
    return min(size, math.ceil(wanted / multiple_of) * multiple_of)


def select_layer_paths(
    scores: PathScores,
    fraction: float,
    multiple_of: int,
    *,
    positive_only: bool,
    threshold: float | None = None,
) -> LayerPaths:
    """The best scored entries of one layer: S_mid, and S_in and S_out where they are scored.

    Args:
        scores: of one layer, the same on every rank.
        positive_only: drop scores <= 0; so that a path may be empty.
        threshold: also drop scores below this share of the layer's largest one.
    """

    def select(values: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if values is None:
            return None, None
        limits = (kept_count(len(values), fraction, multiple_of), positive_only, threshold or 0.0)
        if values.device.type == "cpu":  # nothing to wait for, and fewer rows are less work
            return ops.select_paths(values, *limits), None
        return ops.select_paths_padded(values, *limits)

    sides = [select(values) for values in (scores.mid, scores.inputs, scores.outputs)]
    (rows, inputs, outputs), used = zip(*sides, strict=True)
    return LayerPaths(rows, inputs, outputs, None, *used)


def random_layer_paths(
    num_layers: int,
    size: int,
    hidden_size: int | None,
    fraction: float,
    multiple_of: int,
    *,
    seed: int,
    step: int,
    device,
) -> list[LayerPaths]:
    """Uniform paths, a function of (seed, step) alone and so equal on every rank.

    Args:
        size: f.
        hidden_size: d with ``paths: full``; None: S_mid alone.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))

    def draw(n: int) -> torch.Tensor:
        chosen = rng.choice(n, kept_count(n, fraction, multiple_of), replace=False)
        rows = torch.from_numpy(np.sort(chosen).astype(np.int64))
        return rows.to(device, non_blocking=True)

    paths = []
    for _ in range(num_layers):
        rows = draw(size)
        full = hidden_size is not None
        paths.append(
            LayerPaths(rows, draw(hidden_size), draw(hidden_size)) if full else LayerPaths(rows)
        )
    return paths


class BlockRotation:
    """Which contiguous block of neurons each layer trains, rotation after rotation.

    A layer's windows start at multiples of the block size; if the size does not divide f, one
    more ends at f, so every neuron lies in at least one. A rotation takes each layer's window of
    the highest positive score mass; a ``floor`` share of the rotations, spread evenly, takes the
    window left out longest instead, so that with floor > 0 each of W windows is seen at least
    once in any ceil(W / floor) rotations, whatever the scores say. Without any positive score
    (before the first gradient) it is the window left out longest too. Ties go to the lowest
    window. Deterministic: the same scores give the same blocks on every rank.
    """

    def __init__(self, num_layers: int, size: int, block_size: int, floor: float):
        self.size, self.block_size, self.floor = size, block_size, floor
        starts = list(range(0, size - block_size + 1, block_size))
        if starts[-1] + block_size < size:
            starts.append(size - block_size)
        self.starts = starts
        self.count = 0  # rotations made
        self.last_used = torch.full((num_layers, len(starts)), -1, dtype=torch.int64)
        self.current = torch.full((num_layers,), -1, dtype=torch.int64)  # window indices

    def rotate(self, scores: torch.Tensor) -> list[int]:
        """The next block of every layer.

        Args:
            scores: float [L, f], summed over ranks and over the steps since the last rotation.

        Returns:
            The first neuron of each layer's block.
        """
        share = self.floor + 1e-9  # .1 * 10 must count as a full turn
        floor_turn = int((self.count + 1) * share) > int(self.count * share)
        positive = scores.detach().double().cpu().nan_to_num(0.0).clamp_(min=0.0)
        mass = torch.stack([positive[:, s : s + self.block_size].sum(1) for s in self.starts], 1)
        best = mass.argmax(1)
        oldest = self.last_used.argmin(1)
        use_oldest = (mass.amax(1) <= 0) | floor_turn
        self.current = torch.where(use_oldest, oldest, best)
        self.last_used.scatter_(1, self.current[:, None], self.count)
        self.count += 1
        return self.current_starts()

    def current_starts(self) -> list[int]:
        return [self.starts[i] for i in self.current.tolist()]

    def previous_starts(self) -> list[int] | None:
        """The first neurons of the rotation before; None until there have been two."""
        if self.count < 2:
            return None
        then = self.last_used == self.count - 2  # nothing where the same window was taken again
        windows = torch.where(then.any(1), then.int().argmax(1), self.current)
        return [self.starts[i] for i in windows.tolist()]
