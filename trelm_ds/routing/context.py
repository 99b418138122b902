"""What the FFNs, the model and the routing controller share during a training step.

The model says where the knowledge is (``set_targets``, at the end of its forward), the controller
says how this step is routed (``begin``), and each FFN's backward asks for its paths and hands in
its scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from trelm_ds.routing.paths import LayerPaths, PathScores

# What a backward does with the scores it reads off.
SELECT = "select"  # the step's first backward through a layer chooses the layer's paths
ACCUMULATE = "accumulate"  # every micro-batch adds to ``score_sums``; paths were fixed before


class PendingScores(NamedTuple):
    """Scores of one layer on their way through an all-reduce."""

    scores: PathScores
    works: list


class RoutingContext:
    """The state of routing within one step; plain dense FFNs until a controller begins a step.

    Attributes:
        active: False: every FFN is the ordinary dense computation.
        paths: one ``LayerPaths`` per layer, None while a backward has still to choose it.
        score_sums: float32 [L, f], this rank's scores accumulated over steps (``ACCUMULATE``).
        score: signed | abs_gradient | activation: what the backward reads off.
        full: score FFN inputs and outputs too (``paths: full``).
        exact_input_gradient: False: the gradient of the FFN's input goes through the path alone.
        checkpointing: the encoder layers run under activation checkpointing.
    """

    def __init__(self):
        self.active = False
        self.num_layers = 0
        self.process_group = None
        self.score = "signed"
        self.full = False
        self.exact_input_gradient = True
        self.checkpointing = False
        self.paths: list[LayerPaths | None] = []
        self.score_sums: torch.Tensor | None = None
        self.chosen_by: list[PathScores | None] = []
        self._mode: str | None = None
        self._select: Callable[[PathScores], LayerPaths] | None = None
        self._turn, self._turns = 0, 1
        self._scored: list[bool] = []
        self._positions: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None

    # ---- the model -------------------------------------------------------------------------

    def set_targets(self, flat_positions: torch.Tensor, weights: torch.Tensor) -> None:
        """Where the knowledge of the coming backward is; called at the end of every forward that
        decodes mentions.

        The FIRST backward through a layer after this call is taken for the one of the forward
        that called it: passes made earlier in the same forward (texts of injected entities)
        come later in backward and reuse the paths without being scored.

        Args:
            flat_positions: int64 [P], tokens of decoded mentions, indices into the rows that
                the FFNs see: B * S, or the real tokens of an unpadded run.
            weights: float32 [P], mean p(y*) over the decoded tokens of the position's mention:
                it turns the gradient of log P into that of P.
        """
        self._positions = flat_positions.detach()
        self._weights = weights.detach().float()
        self._scored = [False] * self.num_layers

    # ---- the controller --------------------------------------------------------------------

    def begin(
        self,
        paths: list[LayerPaths | None],
        mode: str | None = None,
        select: Callable[[PathScores], LayerPaths] | None = None,
        turn: int = 0,
        turns: int = 1,
    ) -> None:
        """Opens a routed step.

        Args:
            paths: per layer, None where the layer's first backward has to choose.
            mode: ``SELECT``, ``ACCUMULATE`` or None (the backward computes no scores).
            select: scores of one layer, summed over ranks, to paths; with ``SELECT``.
            turn, turns: with ``ACCUMULATE``, layer l is scored where turn + l is a multiple of
                turns: some layers in each step, so that every step costs alike.
        """
        self.active = True
        self.paths = list(paths)
        self.chosen_by = [None] * len(self.paths)
        self._mode, self._select = mode, select
        self._turn, self._turns = turn, turns
        self._positions = self._weights = None
        self._scored = [False] * self.num_layers

    def end(self) -> None:
        """Closes the step: FFNs are dense again and the batch's tensors are let go."""
        self.active = False
        self._positions = self._weights = None

    @contextlib.contextmanager
    def dense(self):
        """FFNs are plain inside: attribution differentiates the model itself."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active

    # ---- an FFN's backward -----------------------------------------------------------------

    def wants_scores(self, layer: int) -> bool:
        """Whether this backward through ``layer`` has to hand in scores."""
        if self._mode == SELECT:
            return self.paths[layer] is None
        due = (self._turn + layer) % self._turns == 0
        return self._mode == ACCUMULATE and due and not self._scored[layer] and self.has_targets

    @property
    def has_targets(self) -> bool:
        return self._positions is not None and len(self._positions) > 0

    @property
    def score_all_tokens(self) -> bool:
        """Absolute gradients are summed over every token, as meProp and GRASS do, unless a block
        is being trained: its backward has dL/dA at the knowledge positions only."""
        return self.score == "abs_gradient" and self._mode == SELECT

    def targets(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions int64 [P] and weights float32 [P]; empty when nothing was decoded."""
        if self._positions is None:
            return (
                torch.zeros(0, dtype=torch.int64, device=device),
                torch.zeros(0, dtype=torch.float32, device=device),
            )
        weights = self._weights if self.score == "signed" else torch.ones_like(self._weights)
        return self._positions, weights

    def receive_scores(self, layer: int, scores: PathScores) -> None:
        """Chooses the layer's paths from the scores of all ranks, or adds them up for later.

        With ``SELECT`` every rank makes the same all-reduces in the same order, the order of
        the layers in backward, whether or not it has any target.
        """
        if self._mode == SELECT:
            self.select_from(layer, self.send_scores(layer, scores))
            return
        self._scored[layer] = True
        if self.score_sums is None:
            self.score_sums = scores.mid.new_zeros(self.num_layers, len(scores.mid))
        self.score_sums[layer] += scores.mid

    @property
    def defers(self) -> bool:
        """Whether a layer's weight gradients may wait for the ranks to agree on its paths while
        the layer below goes on. Activation checkpointing would record that order anew."""
        return (
            self._mode == SELECT
            and self.process_group is not None
            and self.exact_input_gradient
            and not self.full
            and not self.checkpointing
        )

    @property
    def may_recompute(self) -> bool:
        """Whether a forward may be done again after a backward has chosen the paths, by activation
        checkpointing: what it saves must not depend on them then."""
        return self.checkpointing and self._mode == SELECT

    def send_scores(self, layer: int, scores: PathScores) -> PendingScores:
        """Starts summing a layer's scores over the ranks (``SELECT``)."""
        works = []
        if self.process_group is not None:
            works = [
                dist.all_reduce(tensor, group=self.process_group, async_op=True)
                for tensor in scores.tensors()
            ]
        return PendingScores(scores, works)

    def select_from(self, layer: int, pending: PendingScores) -> None:
        """Waits for the sum and chooses the layer's paths."""
        for work in pending.works:
            work.wait()
        self.chosen_by[layer] = pending.scores
        self.paths[layer] = self._select(pending.scores)

    def all_reduce(self, scores: PathScores) -> None:
        """Sums the scores over the ranks, in place."""
        if self.process_group is not None:
            for tensor in scores.tensors():
                dist.all_reduce(tensor, group=self.process_group)
