"""TRELM: a Hugging Face BERT or RoBERTa composed with injection, decoding, memory and routing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from trelm_ds.backbone import MaskedLanguageModel, encode, load_backbone
from trelm_ds.config import Config
from trelm_ds.data.collate import Batch
from trelm_ds.data.negatives import negative_distribution
from trelm_ds.data.schema import ROLE_NONE
from trelm_ds.data.tokenizer import load_tokenizer
from trelm_ds.errors import DataError
from trelm_ds.knowledge.decoder import RelationalDecoder
from trelm_ds.knowledge.injection import KnowledgeInjection, TransETables
from trelm_ds.losses import (
    TokenPrior,
    entity_scores,
    gold_log_probability,
    mention_probability,
    mlm_split_sums,
    split_weights,
    total_loss,
)
from trelm_ds.memory.bank import MemoryRows
from trelm_ds.memory.mixing import memory_input
from trelm_ds.memory.window import local_memory
from trelm_ds.output_layer import install_output_layer, masked_token_losses
from trelm_ds.routing.attribution import AttributionProblem
from trelm_ds.routing.context import RoutingContext
from trelm_ds.routing.ffn import install_routed_ffn
from trelm_ds.routing.scope import apply_scope
from trelm_ds.routing.truncation import BackwardTruncation


def span_mean(states: torch.Tensor, spans: torch.Tensor, widest: int | None = None) -> torch.Tensor:
    """Mean state of each span.

    A gather of [M, widest span, hidden] and not an index_add, whose order on a GPU is not fixed.

    Args:
        states: float [B, S, hidden].
        spans: int64 [M, 3] rows (row, left, right exclusive).
        widest: tokens of the longest span; None: the spans are asked, and a GPU waited for.
    Returns:
        float [M, hidden].
    """
    row, left, right = spans.unbind(1)
    if widest is None:
        widest = int((right - left).max()) if len(spans) else 1
    offset = torch.arange(widest, device=spans.device)
    inside = offset < (right - left)[:, None]
    position = torch.where(inside, left[:, None] + offset, left[:, None])
    gathered = states[row[:, None], position] * inside[..., None]
    return gathered.sum(1) / (right - left)[:, None]


class Normalizers(NamedTuple):
    """What the sums of a micro-batch are divided by: global counts of the step over
    (world size * accumulation steps), so that the engine's averaging gives the exact mean.

    ``text`` and ``objects`` add up to ``mlm`` and are read with ``train.object_loss_share`` only.
    """

    mlm: float
    cka: float
    entity: float = 1.0
    text: float = 0.0
    objects: float = 0.0


class StepOutput(NamedTuple):
    """Result of one forward. A named tuple, because ZeRO-3 hooks look for tensors in tuples.

    Attributes:
        loss: scalar, Eq. 3.
        mlm_loss: scalar, sum over masked positions / normalizers.mlm, detached; the weighted
            sum of both sides with ``train.object_loss_share``.
        mlm_sums: float32 [2], over text targets and over object targets: -log P(token); zeros
            without ``train.object_loss_share``; detached.
        cka_loss: scalar, sum over decoded tokens / normalizers.cka, detached.
        entity_sums: float32 [2], over decoded triples: -log P(gold entity), gold ranked first;
            zeros without entity decoding; detached.
        local_memory: float32 [M, hidden], Eq. 4, detached; [0, hidden] without memory bank.
        cls: float32 [B, hidden], last state of the first token, detached.
        gold_probability: float32 [D], mean over a row's decoded tokens of P(gold), detached.
        mention_probability: float32 [G], mean over a masked whole mention's tokens of the MLM
            head's p(gold), detached; [0] unless the knowledge state needs it.
    """

    loss: torch.Tensor
    mlm_loss: torch.Tensor
    mlm_sums: torch.Tensor
    cka_loss: torch.Tensor
    entity_sums: torch.Tensor
    local_memory: torch.Tensor
    cls: torch.Tensor
    gold_probability: torch.Tensor
    mention_probability: torch.Tensor


class TrelmModel(MaskedLanguageModel):
    """The model that is trained; only ``backbone`` is exported.

    Every parameter is read through the module that owns it, never directly, because under ZeRO-3 a
    parameter is whole only inside its own module's forward; and the same modules run on every rank
    whatever is in the batch, because each of them is a collective there.

    Args:
        backbone: BertForMaskedLM or RobertaForMaskedLM; its FFNs are replaced by RoutedFFN.
        config: the run's configuration.
        tables: ``KnowledgeTables`` (entity_embeddings, relation_embeddings).
        num_relations: R.
        log_q: float32 [vocabulary], log probabilities of the negative tokens (Eq. 2).

    Attributes:
        backbone: the Hugging Face model with routed FFNs.
        ffns: its RoutedFFN modules, lowest layer first.
        routing_context: what they share with the routing controller.
        truncation: cuts the backward of late steps; the controller switches it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        config: Config,
        tables,
        num_relations: int,
        log_q: torch.Tensor,
    ):
        super().__init__(backbone, config.model.unpad)
        self.config = config
        self.routing_context = RoutingContext()
        self.ffns = install_routed_ffn(backbone, self.routing_context)
        install_output_layer(backbone)
        self.routing_context.checkpointing = config.model.gradient_checkpointing
        if config.model.gradient_checkpointing:
            # Two names of one method: the first is new in transformers 5, the second leaves in 6.
            enable = getattr(backbone, "activation_checkpointing_enable", None)
            enable = enable or backbone.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        hidden_size = backbone.config.hidden_size
        with torch.no_grad():
            output_rms = rms(self.word_embeddings.weight).item()
        self.tables = self.injection = self.decoder = None
        if config.injection.form == "kge":
            self.tables = TransETables(tables.entity_embeddings, tables.relation_embeddings)
            self.injection = KnowledgeInjection(self.tables.dim, hidden_size, output_rms)
        elif config.injection.form == "encoder":
            self.injection = KnowledgeInjection(hidden_size, hidden_size, output_rms)
        if config.decoding.enabled:
            self.decoder = RelationalDecoder(hidden_size, num_relations, config.decoding.scale)
        self.prior = TokenPrior(log_q)
        self.refresh_embedding_rms()
        apply_scope(self, config.routing)
        self.truncation = BackwardTruncation(self, config.routing)

    @classmethod
    def build(cls, config: Config, data_dir: str | Path, graph, tables) -> TrelmModel:
        """The model of a run on a prepared data folder; seed torch before.

        Args:
            config: the run's configuration.
            data_dir: the folder; its tokenizer decides vocabulary and pad token.
            graph: its ``KnowledgeGraph``.
            tables: its ``KnowledgeTables``.
        Raises:
            ConfigError: see ``load_backbone``.
            DataError: no usable tokenizer, or not the model's vocabulary.
        """
        tokenizer = load_tokenizer(Path(data_dir) / "tokenizer")
        backbone = load_backbone(config, tokenizer.get_vocab(), tokenizer.pad_token_id)
        log_q = torch.zeros(len(tokenizer))
        if config.decoding.enabled:
            power = config.decoding.unigram_power
            q = negative_distribution(tables, graph, len(tokenizer), power)
            log_q = torch.from_numpy(q).log().float()
        return cls(backbone, config, tables, graph.num_relations, log_q)

    # -- input ----------------------------------------------------------------------------------

    def _embed(self, batch: Batch, memory: MemoryRows | None, memory_weight: float):
        """Word embeddings with injected mentions replaced (Eq. 7): float [B, S, hidden]."""
        embeds = self.word_embeddings(batch.input_ids)
        use_memory = memory is not None and memory_weight > 0
        if self.injection is None and not use_memory:
            return embeds
        positions, row = batch.injected_positions, batch.injected_row
        flat = embeds.flatten(0, 1)
        values = flat[positions]  # role 0 keeps its own token embeddings
        if self.injection is not None:
            owner = batch.injected_mentions[row]
            injected = self.injection(*self._knowledge(batch), batch.injection_role)[owner]
            has_triple = batch.injection_role[owner] != ROLE_NONE
            values = torch.where(has_triple[:, None], injected.to(values.dtype), values)
        if use_memory:
            mixed = memory_input(
                memory, memory_weight, self.embedding_rms, self.config.memory.rescale
            )
            values = (1.0 - memory_weight) * values + mixed[row].to(values.dtype)
        return flat.index_copy(0, positions, values).view_as(embeds)

    @torch.no_grad()
    def refresh_embedding_rms(self) -> None:
        """Takes the RMS of E that memory rows are scaled to (Eq. 7), once per optimizer step.

        Not in the forward: under ZeRO-3 the table is whole only where the caller gathers it.
        """
        self.embedding_rms = rms(self.word_embeddings.weight)

    def _knowledge(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The other entity's and the relation's vectors, float [M, input] each."""
        if self.tables is not None:
            return self.tables(batch.injection_other, batch.injection_relation)
        with self.truncation.input_gradients():
            return self._encode_texts(batch)

    def _encode_texts(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """DKPLM's form: texts through the shared encoder, gradients on, mean over real tokens.

        Each distinct text is encoded once. Mentions without a triple have the row of pads, and
        their vector is not used.
        """
        mask = batch.text_mask
        packing = self._packing(mask, batch.text_tokens)
        states = encode(self.backbone, self.word_embeddings(batch.text_ids), mask, packing)
        other, relation = masked_mean(states, mask)[batch.text_index]
        return other, relation

    # -- training forward -----------------------------------------------------------------------

    def forward(
        self,
        batch: Batch,
        memory: MemoryRows | None,
        memory_weight: float,
        normalizers: Normalizers,
    ) -> StepOutput:
        """Loss of one micro-batch (Eqs. 2, 3, 4, 7).

        Args:
            batch: on the model's device; M, K and D may be 0.
            memory: rows of ``batch.injected_mentions``, or None.
            memory_weight: lambda_q of Eq. 8.
            normalizers: see ``Normalizers``; a count of 0 gives a loss of 0.
        """
        packing = self._packing(batch.attention_mask, batch.num_tokens)
        embeds = self._embed(batch, memory, memory_weight)
        states = encode(self.backbone, embeds, batch.attention_mask, packing)
        masked = states.flatten(0, 1)[batch.mlm_positions]
        losses = masked_token_losses(self.backbone, masked, batch.mlm_labels)
        share = self.config.train.object_loss_share
        if share is None:
            mlm = losses.sum() / (normalizers.mlm or 1.0)
            mlm_sums = mlm.new_zeros(2)
        else:
            sums = mlm_split_sums(losses, batch.mlm_mention >= 0)
            text, objects = split_weights(share, normalizers.text, normalizers.objects)
            mlm = text * sums[0] + objects * sums[1]
            mlm_sums = sums.detach()
        entity_sums = mlm.new_zeros(2)
        known = mlm.new_zeros(0)
        if self.config.sampling.form == "knowledge_state":
            known = mention_probability(losses, batch.mlm_mention_group, batch.num_mlm_mentions)
        if self.decoder is None:
            loss, cka = mlm, torch.zeros_like(mlm)
            gold_probability = mlm.new_zeros(len(batch.decode_mention))
        else:
            # A mention's state once, though all its triples ask it. Mentions that none asks may be
            # wider than what is gathered; their rows are not read.
            pooled = span_mean(states, batch.mention_spans, batch.decoded_width)
            weight = self.config.decoding.entity_weight
            words = batch.entity_words if weight else None
            decoded, log_p, words = self._decode(
                pooled[batch.decode_mention],
                *(batch.decode_relation, batch.decode_tokens, batch.decoded_positions),
                *(batch.negatives, words),
            )
            valid = batch.decode_tokens >= 0
            knowledge = cka = -log_p.sum() / (normalizers.cka or 1.0)
            if weight:
                entity, entity_sums = self._choose_entities(decoded[:, 0], words, batch)
                knowledge = (1 - weight) * cka + weight * entity / (normalizers.entity or 1.0)
            loss = total_loss(mlm, knowledge, self.config.decoding.loss_weight)
            with torch.no_grad():
                count = valid.sum(1).clamp(min=1)
                gold_probability = (log_p.exp() * valid).sum(1) / count
            self._set_routing_targets(batch, packing, gold_probability, valid.any(1))
        detached = states.detach()
        if self.config.memory.enabled:
            local = local_memory(
                detached,
                batch.attention_mask,
                batch.mention_spans,
                self.config.memory.half_window,
                self.config.memory.paper_norm,
                batch.window_tokens,
            )
        else:
            local = detached.new_zeros(0, detached.shape[-1])
        return StepOutput(
            loss,
            mlm.detach(),
            mlm_sums,
            cka.detach(),
            entity_sums,
            local.float(),
            detached[:, 0].float(),
            gold_probability.float(),
            known,
        )

    def _decode(
        self, pooled, relation, tokens, positions, negatives, words=None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Decoded states [D, T, hidden], log P(gold) of every decoded token [D, T] (0 at pads) and
        the embeddings of ``words``. ``positions`` [V]: the tokens among ``tokens`` [D, T], flat."""
        steps = max(1, tokens.shape[1])  # one step where nothing is decoded keeps the graph whole
        decoded = self.decoder(pooled, relation, steps)
        gold = tokens.flatten()[positions]
        # One lookup: each has a gradient of the whole table's size to zero, fill and add up.
        wanted = [gold, negatives] if words is None else [gold, negatives, words]
        looked_up = self.word_embeddings(torch.cat(wanted)).split([len(part) for part in wanted])
        log_p = gold_log_probability(
            decoded.flatten(0, 1)[positions],
            gold,
            looked_up[0],
            negatives,
            looked_up[1],
            self.prior,
        )
        padded = log_p.new_zeros(tokens.numel()).index_copy(0, positions, log_p).view_as(tokens)
        return decoded, padded, None if words is None else looked_up[2]

    def _choose_entities(self, states, words, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of -log P(gold entity) over the triples, and ``StepOutput.entity_sums``.

        The query is h_d^1: the mention's state through the relation, already trained to score the
        first token of the answer, so that both losses shape one map and no parameter is added.
        ``words`` are the embeddings of ``batch.entity_words``; a name's vector is their mean.
        """
        dtype = torch.promote_types(words.dtype, torch.float32)
        table = nn.functional.pad(words.to(dtype), (0, 0, 1, 0))  # row 0: no token
        vectors = nn.functional.embedding_bag(batch.entity_names, table, mode="mean", padding_idx=0)
        log_p, first = entity_scores(
            states, vectors, batch.entity_log_q, batch.entity_gold, batch.entity_hits
        )
        loss = -log_p.sum()
        return loss, torch.stack([loss.detach().float(), first.sum().float()])

    @torch.no_grad()
    def _set_routing_targets(self, batch, packing, gold_probability, decoded) -> None:
        """Knowledge positions: tokens of decoded mentions, weighted by their mean P(gold).

        As rows of what the FFNs see: the packed row, or all of B * S.
        """
        size = len(batch.mention_spans)
        total = gold_probability.new_zeros(size).index_add(
            0, batch.decode_mention, gold_probability * decoded
        )
        count = decoded.new_zeros(size, dtype=torch.int64).index_add(
            0, batch.decode_mention, decoded.long()
        )
        positions, owner = batch.knowledge_positions, batch.knowledge_owner
        if packing is not None:
            positions = packing.rows(positions)
        self.routing_context.set_targets(positions, (total / count.clamp(min=1))[owner])

    # -- attribution ----------------------------------------------------------------------------

    def attribution_problem(
        self, batch: Batch, memory: MemoryRows | None, memory_weight: float
    ) -> AttributionProblem:
        """The micro-batch as ``trelm_ds.routing.attribution`` wants it."""

        def run_encoder():  # padded: single layers are run again on copies of single sequences
            return encode(
                self.backbone, self._embed(batch, memory, memory_weight), batch.attention_mask
            )

        def gold_probability(hidden_states, mentions):
            copy, row = (mentions[:, None] == batch.decode_mention[None]).nonzero(as_tuple=True)
            spans = batch.mention_spans[batch.decode_mention[row]].clone()
            spans[:, 0] = copy
            tokens = batch.decode_tokens[row]
            valid = tokens >= 0
            _, log_p, _ = self._decode(
                span_mean(hidden_states, spans),
                *(batch.decode_relation[row], tokens, valid.flatten().nonzero()[:, 0]),
                batch.negatives,
            )
            probability = (log_p.exp() * valid).sum(1)
            return probability.new_zeros(len(mentions)).index_add(0, copy, probability)

        has_tokens = (batch.decode_tokens >= 0).any(1)
        return AttributionProblem(
            encode=run_encoder,
            layers=self.backbone.base_model.encoder.layer,
            spans=batch.mention_spans,
            mentions=torch.unique(batch.decode_mention[has_tokens]),
            gold_probability=gold_probability,
        )

    # -- start-up ------------------------------------------------------------------------------

    def name_embeddings(self, tables):
        """Where local memory starts: the mean embedding of each key's name tokens.

        Args:
            tables: ``KnowledgeTables``: entity names as token ids; long-tail words as tokens.
        Returns:
            A function of keys int64 [n] on the CPU to float32 [n, hidden].
        Raises:
            DataError: a long-tail word is no token of the folder's tokenizer.
        """

        words = [word for word, _ in tables.long_tail_words]
        word_ids = np.zeros(0, dtype=np.int64)
        if words:
            # As tokens and not as text: `Ġparis` is one token, and its letters are others.
            vocabulary = load_tokenizer(tables.folder / "tokenizer").get_vocab()
            unknown = next((word for word in words if word not in vocabulary), None)
            if unknown is not None:
                raise DataError(
                    f"{tables.folder}/tables/long_tail_words.tsv: {unknown!r} is no token of the "
                    "folder's tokenizer"
                )
            word_ids = np.array([vocabulary[word] for word in words])

        @torch.no_grad()
        def rows(keys: torch.Tensor) -> torch.Tensor:
            keys = keys.numpy()
            word = keys - tables.num_entities
            token_ids = np.full((len(keys), tables.entity_names.shape[1]), -1, dtype=np.int64)
            token_ids[word < 0] = tables.entity_names[keys[word < 0]]
            token_ids[word >= 0, 0] = word_ids[word[word >= 0]]
            ids = torch.from_numpy(token_ids).to(self.word_embeddings.weight.device)
            return masked_mean(self.word_embeddings(ids.clamp(min=0)).float(), ids >= 0)

        return rows

    def routed_parameters(self):
        """(layer, kind, parameter) of every FFN tensor; kinds as in ``RoutedFFN``."""
        for ffn in self.ffns:
            for kind, parameter in ffn.named_parameters():
                yield ffn.layer_index, kind, parameter

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters: ``total``, ``trained``, and ``routed`` (trained, in FFNs)."""
        routed = {id(p) for _, _, p in self.routed_parameters()}
        counts = {"total": 0, "trained": 0, "routed": 0}
        for parameter in self.parameters():
            size = getattr(parameter, "ds_numel", parameter.numel())  # whole, under ZeRO-3 too
            counts["total"] += size
            if parameter.requires_grad:
                counts["trained"] += size
                counts["routed"] += size if id(parameter) in routed else 0
        return counts


def parameter_groups(model: TrelmModel, weight_decay: float) -> list[dict]:
    """Optimizer groups: with and without weight decay, the FFNs' tensors in groups of their own.

    Biases and LayerNorms are not decayed. DeepSpeed flattens a group and never mixes two, so an
    optimizer that masks path updates finds only routed tensors in the groups flagged ``routed``.

    Returns:
        Non-empty groups ``{"params", "names", "weight_decay", "routed"}`` of trained parameters.
    """
    routed = {id(p) for _, _, p in model.routed_parameters()}
    groups: dict[tuple[bool, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.dim() > 1
        key = (id(parameter) in routed, decayed)
        group = groups.setdefault(
            key,
            {
                "params": [],
                "names": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "routed": key[0],
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def rms(values: torch.Tensor) -> torch.Tensor:
    """Root mean square of all entries, in float32."""
    return values.float().pow(2).mean().sqrt()


def masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over dim 1 of states [n, t, hidden] where mask [n, t] is not 0; zeros for no token."""
    mask = mask.to(states.dtype)[..., None]
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)
