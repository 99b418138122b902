"""The routing of a run: when, by which form, and what it amounted to (TRELM section 3.3)."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from trelm_ds.config import Config, RoutingConfig
from trelm_ds.distributed import new_group
from trelm_ds.errors import CheckpointError, ConfigError
from trelm_ds.evaluation_mode import evaluation_mode
from trelm_ds.routing.attribution import integrated_gradients
from trelm_ds.routing.context import ACCUMULATE, SELECT, RoutingContext
from trelm_ds.routing.ffn import RoutedFFN
from trelm_ds.routing.paths import (
    BlockRotation,
    LayerPaths,
    PathScores,
    kept_count,
    random_layer_paths,
    select_layer_paths,
)
from trelm_ds.routing.truncation import BackwardTruncation

logger = logging.getLogger(__name__)

DENSE_FORMS = ("none", "frozen")
ATTRIBUTION_FORMS = ("exact", "quadrature")  # integrated gradients before the backward
BACKWARD_FORMS = ("in_backward", "activation")  # chosen by the backward itself


def refuse_unsupported(config: Config, zero_stage: int) -> None:
    """Refuses combinations of routing with the rest of the run that cannot work.

    Raises:
        ConfigError: one line that names the keys.
    """
    routing = config.routing
    if routing.compact_gradients and zero_stage != 0:
        raise ConfigError(
            f"routing.compact_gradients does not work with ZeRO stage {zero_stage}, which sends "
            "gradients by partitions: use ds_configs/zero0.json"
        )
    if routing.threshold is not None and routing.form not in ATTRIBUTION_FORMS + BACKWARD_FORMS:
        raise ConfigError(
            f"routing.threshold drops neurons by their score, and routing.form {routing.form} does "
            f"not choose them by one: use it with {', '.join(ATTRIBUTION_FORMS + BACKWARD_FORMS)}"
        )
    if routing.form in DENSE_FORMS:
        if routing.audit_steps:
            raise ConfigError(
                f"routing.audit_steps compares paths, and routing.form {routing.form} has none"
            )
        return
    integrates = routing.form in ATTRIBUTION_FORMS or routing.audit_steps > 0
    what = f"routing.form {routing.form}" if not routing.audit_steps else "routing.audit_steps"
    if integrates and zero_stage == 3:
        raise ConfigError(
            f"{what} re-runs single layers, which ZeRO-3's partitioned parameters do not allow: "
            "use ZeRO stage 0, 1 or 2, or routing.form block or in_backward without audits"
        )
    needs_decoding = (
        integrates
        or routing.form == "activation"
        or (routing.form == "in_backward" and routing.score == "signed")
    )
    if needs_decoding and not config.decoding.enabled:
        raise ConfigError(
            f"{what} scores neurons at the tokens of decoded mentions: it needs "
            "decoding.enabled true (or routing.form block or random, or in_backward with "
            "routing.score abs_gradient)"
        )


class RoutingController:
    """Opens and closes each step's routing, counts updates per neuron, reports.

    A step: ``begin_step``; for every micro-batch ``before_micro_batch``, forward, backward; the
    optimizer's step, which reads ``frozen`` and ``row_counts``; ``end_step``. Between steps the
    FFNs are dense. Every rank makes the same calls: some of them are collective.

    Attributes:
        cut: layers below the cut of the last step begun; 0: its backward was whole. They are
            neither scored nor updated nor counted.
    """

    def __init__(
        self,
        config: RoutingConfig,
        ffns: Sequence[RoutedFFN],
        context: RoutingContext,
        total_steps: int,
        seed: int,
        process_group=None,
        truncation: BackwardTruncation | None = None,
    ):
        """Prepares routing for a run.

        Args:
            ffns: lowest layer first; all of one shape.
            total_steps: of the run; ``start`` and ``truncate_start`` are fractions of it.
            process_group: for the scores' all-reduces, of its own so that they cannot mix with
                the engine's; None: one is made when there is more than one rank (collective).
            truncation: of the model; None: every backward is whole.
        """
        self.config, self.ffns, self.context, self.seed = config, list(ffns), context, seed
        self.num_layers = len(self.ffns)
        self.size = self.ffns[0].intermediate_size
        self.hidden_size = self.ffns[0].hidden_size
        self.process_group = process_group or new_group()

        context.process_group = self.process_group
        context.num_layers = self.num_layers
        context.full = config.paths == "full"
        context.exact_input_gradient = config.input_gradient == "exact"
        context.score = "activation" if config.form == "activation" else config.score

        self.total_steps = total_steps
        self.truncation = truncation
        self.cut = 0
        self.counts = torch.zeros(self.num_layers, self.size, dtype=torch.int64)
        self.blocks = BlockRotation(
            self.num_layers,
            self.size,
            kept_count(self.size, config.kept_fraction, config.multiple_of),
            config.floor,
        )
        self.last_rotation = -1  # step
        self.step = -1
        self.routed = False
        self._micro_batch = 0
        self._previous: list[LayerPaths] | None = None  # paths of the routed step before
        self._current: list[LayerPaths] | None = None
        self._scores: list[torch.Tensor | None] = [None] * self.num_layers  # they were chosen by
        self._sums_before: torch.Tensor | None = None  # a block's running scores before the step
        self._reference: PathScores | None = None  # of an audited step
        self._masks: dict[str, torch.Tensor] | None = None  # of the step, once asked for
        self._audit: dict[str, float] = {}  # since the last report
        self._attribution_s = self._audit_s = 0.0
        self._steps = 0

    @property
    def device(self) -> torch.device:
        """Where the FFNs are now: the engine moves the model after the controller was made."""
        return self.ffns[0].down_bias.device

    # ---- the step --------------------------------------------------------------------------

    def begin_step(self, step: int, progress: float | None = None) -> None:
        """Opens optimizer step ``step`` (0-based). Collective when a block rotates.

        ``progress``: share of the run's budget spent, for ``start`` and ``truncate_start``; None:
        by steps.
        """
        form = self.config.form
        self.step = step
        self.routed = form not in DENSE_FORMS and self._reached(self.config.start, progress)
        if self.truncation is not None and self.truncation.depth:
            self.truncation.active = self._reached(self.config.truncate_start, progress)
            self.cut = self.truncation.depth if self.truncation.active else 0
        self._micro_batch = 0
        self._reference = self._masks = None
        if not self.routed:
            self.context.end()
            return
        undecided = [None] * self.num_layers
        if form == "block":
            self._rotate_if_due(step)
            sums = self.context.score_sums
            self._sums_before = None if sums is None else sums.clone()
            size = self.blocks.block_size
            starts = self.blocks.current_starts()
            # a fixed block has no use for scores
            mode = ACCUMULATE if self.config.rotation_steps > 0 else None
            self.context.begin(
                [LayerPaths.block(s, size, self.device) for s in starts],
                mode,
                turn=step,
                turns=max(1, min(self.config.score_steps, self.config.rotation_steps)),
            )
        elif form == "random":
            self.context.begin(
                random_layer_paths(
                    self.num_layers,
                    self.size,
                    self.hidden_size if self.config.paths == "full" else None,
                    self.config.kept_fraction,
                    self.config.multiple_of,
                    seed=self.seed,
                    step=step,
                    device=self.device,
                )
            )
        elif form in BACKWARD_FORMS:
            self.context.begin(undecided, SELECT, self._select)
        else:
            self.context.begin(undecided)

    def before_micro_batch(self, model, batch, memory, memory_weight: float) -> None:
        """Before each micro-batch's forward: attribution and audits happen here, on the first.

        Collective on the steps where it attributes. All micro-batches of a step share the paths
        of its first one, whose targets on all ranks decide.

        Args:
            model: offers ``attribution_problem(batch, memory, memory_weight)``
                (see ``routing/attribution.py``).
            batch, memory, memory_weight: as for the model's forward, on its device.
        """
        first, self._micro_batch = self._micro_batch == 0, self._micro_batch + 1
        if not (self.routed and first):
            return
        form = self.config.form
        audit = self.config.audit_steps > 0 and self.step % self.config.audit_steps == 0
        if form not in ATTRIBUTION_FORMS and not audit:
            return
        begin = self._clock()
        with evaluation_mode(model), self.context.dense():
            problem = model.attribution_problem(batch, memory, memory_weight)
            if form in ATTRIBUTION_FORMS:
                scores = self._attribute(problem, form, self.config.paths == "full")
                self._choose_all(scores)
            if audit:
                audit_begin = self._clock()
                self._reference = self._attribute(problem, self.config.audit_form, False)
                self._audit_s = self._clock() - audit_begin
        self._attribution_s += self._clock() - begin

    def frozen(self, layer: int) -> bool:
        """Whether the layer (-1: what lies below the first) is below the step's cut.

        Once it is, it stays so to the end of the run: the optimizer need not know how often its
        parameters have been updated.
        """
        return layer < self.cut if self.cut else False

    def row_counts(self, layer: int) -> torch.Tensor:
        """Updates of each neuron including this step's, 0 where it is off the path.

        To be read by the optimizer, after the step's last backward and before ``end_step``. Where
        a GPU chose the paths, the first question waits for it and answers all others of the step.

        Returns:
            int64 [f] on the CPU.
        """
        return (self.counts[layer] + 1) * self._updated_rows(layer)

    def layer_paths(self, layer: int) -> LayerPaths | None:
        """The paths of a layer above the cut in this step; None when all of its FFN trains.

        To be read after the step's last backward and before ``end_step``.
        """
        return self.context.paths[layer] if self.routed else None

    def active_inputs(self, layer: int) -> torch.Tensor | None:
        """S_in as a mask, bool [d] on the CPU; None when every input is on the path."""
        return self._kept_entries(layer, "inputs")

    def active_outputs(self, layer: int) -> torch.Tensor | None:
        """S_out as a mask, bool [d] on the CPU; None when every output is on the path."""
        return self._kept_entries(layer, "outputs")

    def end_step(self, applied: bool) -> None:
        """Closes the step. ``applied``: False when the optimizer skipped it (overflow)."""
        if applied:
            for layer in range(self.num_layers):
                self.counts[layer] += self._updated_rows(layer)
        elif self.routed and self.config.form == "block":  # what was not finite would stay in them
            self.context.score_sums = self._sums_before
        self._steps += 1
        if self.routed:
            nothing = torch.zeros(0, dtype=torch.int64, device=self.device)
            paths = [LayerPaths(nothing)] * self.cut
            paths += [p or LayerPaths(nothing) for p in self.context.paths[self.cut :]]
            self._previous, self._current = self._current, paths
            if self.config.form in BACKWARD_FORMS:
                chosen_by = self.context.chosen_by
                self._scores = [None if s is None else s.mid for s in chosen_by]
            if self._reference is not None:
                self._audit = self._compare_with_reference([p.compact() for p in paths])
        self._reference = None
        self.context.end()
        if self.truncation is not None:
            self.truncation.active = False

    # ---- reports ---------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """What routing did, under the names of the metrics file. Reads back from the device.

        ``routing/truncated_layers``: layers below the last step's cut, if the run ever truncates;
        ``routing/kept_fraction``: neurons updated by the last step, mean over all layers;
        ``routing/kept_weight_fraction``: FFN weights on the path, with ``paths: full``;
        ``routing/jaccard``: last path set against the one of the step before (``block``: of the
        rotation before), mean over layers above the cut;
        ``routing/captured_mass``: share of the positive score mass that lies on the path, by the
        scores it was chosen by (absent for a random or fixed path);
        ``routing/audit_jaccard``, ``routing/audit_captured_mass``: an audited step's paths
        against the best sets of the same size by ``audit_form``, the mass relative to theirs;
        ``routing/audit_s_per_layer``: what the audit took; ``routing/layer_N/kept_fraction``,
        ``routing/layer_N/audit_jaccard`` and ``routing/layer_N/audit_captured_mass``: the same by
        layer. These are there once after an audit;
        ``time/attribution_s``: integrated gradients and audits, per step since the last call.
        """
        result = {}
        if self.truncation is not None and self.truncation.depth:
            result["routing/truncated_layers"] = self.cut
        if self.config.form in DENSE_FORMS:
            return result
        result["time/attribution_s"] = self._attribution_s / max(1, self._steps)
        self._attribution_s, self._steps = 0.0, 0
        if not self.routed or self._current is None:
            result["routing/kept_fraction"] = 1.0 - self.cut / self.num_layers
            return result
        current = [p.compact() for p in self._current]
        kept = [len(p.rows) / self.size for p in current]
        result["routing/kept_fraction"] = _mean(kept)
        if self.config.paths == "full":
            result["routing/kept_weight_fraction"] = _mean(
                rows * (len(p.inputs) + len(p.outputs)) / (2 * self.hidden_size)
                for rows, p in zip(kept, current, strict=True)
                if p.inputs is not None
            )
        previous = self._previous
        if self.config.form == "block":  # from step to step it hardly ever changes
            starts = self.blocks.previous_starts()
            size = self.blocks.block_size
            previous = starts and [LayerPaths.block(s, size, self.device) for s in starts]
        if previous is not None:
            result["routing/jaccard"] = _mean(
                _jaccard(previous[layer].compact().rows, current[layer].rows)
                for layer in self._trained_layers()
            )
        mass = self._mass(current)
        if mass is not None:
            result["routing/captured_mass"] = mass
        result.update(self._audit)
        self._audit = {}
        return result

    # ---- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state of routing: CPU tensors, the same on every rank. Collective for ``block``.

        ``block.scores`` [ranks, L, f] holds every rank's own running sums, so that a resumed run
        adds up in the same order as one that never stopped.
        """
        state = {"counts": self.counts.clone()}
        if self._current is not None:
            previous = torch.zeros(self.num_layers, self.size, dtype=torch.bool)
            for kept, paths in zip(previous, self._current, strict=True):
                kept[:] = paths.kept("rows", self.size)
            state["previous_paths"] = previous
        if self.config.form == "block":
            state["block.rotations"] = torch.tensor(self.blocks.count)
            state["block.last_rotation"] = torch.tensor(self.last_rotation)
            state["block.current"] = self.blocks.current.clone()
            state["block.last_used"] = self.blocks.last_used.clone()
            state["block.scores"] = self._gather_block_scores()
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse. On another number of ranks the first one holds the sums of all.

        Raises:
            CheckpointError: the state belongs to another routing form or model shape.
        """
        self._check_shape("neurons", state["counts"], self.counts)
        self.counts.copy_(state["counts"])
        self._current = None
        if "previous_paths" in state:
            self._current = [
                LayerPaths(kept.nonzero()[:, 0].to(self.device)) for kept in state["previous_paths"]
            ]
        if self.config.form != "block":
            return
        if "block.scores" not in state:
            raise CheckpointError("the checkpoint has no state of routing.form block")
        self._check_shape("blocks", state["block.last_used"], self.blocks.last_used)
        scores, shape = state["block.scores"], (self.num_layers, self.size)
        if scores.shape[1:] != shape:
            raise CheckpointError(
                f"the checkpoint's block scores are of shape {tuple(scores.shape[1:])}, the run's "
                f"of {shape}"
            )
        if len(scores) != self._world_size():
            total = scores.sum(0, keepdim=True)
            scores = torch.cat([total, total.new_zeros(self._world_size() - 1, *shape)])
        self.blocks.count = int(state["block.rotations"])
        self.last_rotation = int(state["block.last_rotation"])
        self.blocks.current.copy_(state["block.current"])
        self.blocks.last_used.copy_(state["block.last_used"])
        self.context.score_sums = scores[self._rank()].to(self.device, copy=True)

    # ---- internals -------------------------------------------------------------------------

    def _select(self, scores: PathScores) -> LayerPaths:
        return select_layer_paths(
            scores,
            self.config.kept_fraction,
            self.config.multiple_of,
            # Eq. 9's sign is kept: what lowers P is no knowledge path
            positive_only=self.context.score == "signed" or self.config.form in ATTRIBUTION_FORMS,
            threshold=self.config.threshold,
        )

    def _choose_all(self, scores: PathScores) -> None:
        """Paths of every layer from integrated gradients; the threshold is a share of the largest
        score of all layers here (Dai et al.), of the layer's where layers choose one by one."""
        self._scores = list(scores.mid.clone())  # before the threshold
        if self.config.threshold:
            for values in scores.tensors():
                values[values < self.config.threshold * values.max()] = 0
        self.context.paths = [self._select(scores.of_layer(i)) for i in range(self.num_layers)]

    def _attribute(self, problem, form: str, full: bool) -> PathScores:
        rule, nodes = (
            ("riemann_right", self.config.attribution_steps)
            if form == "exact"
            else ("gauss_legendre", self.config.quadrature_nodes)
        )
        scores = integrated_gradients(
            *(problem, rule, nodes),
            full=full,
            max_targets=self.config.max_targets,
            first_layer=self.cut,
        )
        self.context.all_reduce(scores)
        return scores

    def _rotate_if_due(self, step: int) -> None:
        first = self.last_rotation < 0
        rotation_steps = self.config.rotation_steps
        if not first and (rotation_steps == 0 or step - self.last_rotation < rotation_steps):
            return
        sums = self.context.score_sums
        if sums is None:
            sums = torch.zeros(self.num_layers, self.size, device=self.device)
        # The one collective of block routing: on every rank at the same step, scored or not.
        self.context.all_reduce(PathScores(sums))
        self.blocks.rotate(sums)
        self._scores = list(sums) if not first else [None] * self.num_layers
        self.context.score_sums = None
        self.last_rotation = step

    def _clock(self) -> float:
        """Seconds, when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _reached(self, share: float, progress: float | None) -> bool:
        """Whether the step to come lies at or after this share of the run."""
        if progress is None:
            progress = self.step / self.total_steps
        return progress >= share - 1e-9

    def _trained_layers(self) -> range:
        return range(self.cut, self.num_layers)

    def _updated_rows(self, layer: int) -> torch.Tensor:
        """Neurons that the step updates, bool [f]."""
        if self.frozen(layer) or not self.routed:
            return torch.full((self.size,), not self.frozen(layer))
        return self._kept_masks()["rows"][layer]

    def _kept_entries(self, layer: int, which: str) -> torch.Tensor | None:
        if not self.routed or self.config.paths != "full":
            return None
        return self._kept_masks()[which][layer]

    def _kept_masks(self) -> dict[str, torch.Tensor]:
        """The step's paths on the CPU: ``rows`` bool [L, f]; with ``paths: full``, ``inputs`` and
        ``outputs`` bool [L, d].

        The optimizer asks several times a layer. What a GPU has chosen is copied once a step, all
        layers together; where a block lies is known without.
        """
        if self._masks is None:
            sizes = {"rows": self.size}
            if self.config.paths == "full":
                sizes |= {"inputs": self.hidden_size, "outputs": self.hidden_size}
            masks = [
                None if paths is None else torch.cat([paths.kept(*side) for side in sizes.items()])
                for paths in self.context.paths
            ]
            device = next((mask.device for mask in masks if mask is not None), "cpu")
            nothing = torch.zeros(sum(sizes.values()), dtype=torch.bool, device=device)
            kept = torch.stack([nothing if mask is None else mask for mask in masks]).cpu()
            self._masks = dict(zip(sizes, kept.split(list(sizes.values()), 1), strict=True))
        return self._masks

    def _mass(self, paths: list[LayerPaths]) -> float | None:
        pairs = [(paths[i], self._scores[i]) for i in self._trained_layers()]
        pairs = [(p, s) for p, s in pairs if s is not None]
        total = sum(float(s.clamp(min=0).sum()) for _, s in pairs)
        if total <= 0:
            return None
        return sum(float(s[p.rows].clamp(min=0).sum()) for p, s in pairs) / total

    def _compare_with_reference(self, paths: list[LayerPaths]) -> dict[str, float]:
        layers = self._trained_layers()
        result = {"routing/audit_s_per_layer": self._audit_s / len(layers)}
        overlaps, total, best_total = [], 0.0, 0.0
        for layer in layers:
            rows = paths[layer].rows
            scores = self._reference.mid[layer].clamp(min=0)
            best = torch.topk(scores, len(rows)).indices
            overlaps.append(_jaccard(rows, best))
            mass, best_mass = float(scores[rows].sum()), float(scores[best].sum())
            total, best_total = total + mass, best_total + best_mass
            result[f"routing/layer_{layer}/kept_fraction"] = len(rows) / self.size
            result[f"routing/layer_{layer}/audit_jaccard"] = overlaps[-1]
            if best_mass > 0:
                result[f"routing/layer_{layer}/audit_captured_mass"] = mass / best_mass
        result["routing/audit_jaccard"] = _mean(overlaps)
        if best_total > 0:
            result["routing/audit_captured_mass"] = total / best_total
        return result

    @staticmethod
    def _check_shape(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
        if found.shape != wanted.shape:
            raise CheckpointError(
                f"the checkpoint's routing has {' x '.join(map(str, found.shape))} {what} "
                f"(layers x {what}), the run has {' x '.join(map(str, wanted.shape))}"
            )

    def _world_size(self) -> int:
        return dist.get_world_size(self.process_group) if self.process_group is not None else 1

    def _rank(self) -> int:
        return dist.get_rank(self.process_group) if self.process_group is not None else 0

    def _gather_block_scores(self) -> torch.Tensor:
        sums = self.context.score_sums
        if sums is None:
            sums = torch.zeros(self.num_layers, self.size, device=self.device)
        if self.process_group is None:
            return sums.cpu()[None].clone()
        parts = [torch.empty_like(sums) for _ in range(self._world_size())]
        dist.all_gather(parts, sums, group=self.process_group)
        return torch.stack(parts).cpu()


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _jaccard(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a and b| / |a or b| of two sets of distinct indices; 1 for two empty ones."""
    union = torch.cat([a, b]).unique().numel()
    return (len(a) + len(b) - union) / union if union else 1.0
