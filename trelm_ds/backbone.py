"""Hugging Face backbones: BERT and RoBERTa made or loaded, encoded, and asked as they are."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertConfig,
    RobertaConfig,
)
from transformers.utils import logging as hf_logging

from trelm_ds.config import FROM_SCRATCH, Config, ModelConfig
from trelm_ds.data.tokenizer import has_tokenizer, load_tokenizer
from trelm_ds.errors import ConfigError, DataError, one_line
from trelm_ds.output_layer import mlm_head
from trelm_ds.routing.ffn import to_hf_state_dict
from trelm_ds.unpadding import Packing, encode_packed, install_packed_attention

logger = logging.getLogger(__name__)

MODEL_TYPES = ("bert", "roberta")


def build_backbone(config: Config, vocab_size: int, pad_token_id: int) -> nn.Module:
    """A randomly initialised BERT or RoBERTa by ``config.model``; the caller seeds torch."""
    model = config.model
    shape = dict(
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=model.max_position_embeddings,
        hidden_dropout_prob=model.hidden_dropout_prob,
        attention_probs_dropout_prob=model.attention_probs_dropout_prob,
        initializer_range=model.initializer_range or 0.02 * math.sqrt(768 / model.hidden_size),
    )
    if model.model_type == "roberta":
        # RoBERTa counts positions from pad_token_id + 1, so its table is that much longer.
        shape["max_position_embeddings"] += pad_token_id + 1
        hf_config = RobertaConfig(**shape, type_vocab_size=1, layer_norm_eps=1e-5)
    else:
        hf_config = BertConfig(**shape)
    return AutoModelForMaskedLM.from_config(
        hf_config, attn_implementation=model.attn_implementation
    )


def read_backbone_config(folder: str | Path):
    """The Hugging Face configuration of a local model folder; nothing is downloaded.

    Raises:
        ConfigError: no such folder, no readable ``config.json``, or another type of model.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"model {folder}: no such folder (a local folder is needed)")
    try:
        hf_config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {folder}: {one_line(error)}") from None
    if hf_config.model_type not in MODEL_TYPES:
        raise ConfigError(
            f"model {folder}: type {hf_config.model_type!r} is not one of {', '.join(MODEL_TYPES)}"
        )
    return hf_config


def load_pretrained(folder: str | Path, attn_implementation: str = "sdpa") -> nn.Module:
    """BertForMaskedLM or RobertaForMaskedLM in float32 from a local folder.

    Raises:
        ConfigError: as ``read_backbone_config``, or its weights cannot be read.
    """
    hf_config = read_backbone_config(folder)
    try:
        with no_progress_bar():
            backbone, report = AutoModelForMaskedLM.from_pretrained(
                str(folder),
                config=hf_config,
                local_files_only=True,
                attn_implementation=attn_implementation,
                output_loading_info=True,
            )
    except Exception as error:  # safetensors, pickle, shapes: each library has its own errors
        raise ConfigError(f"model {folder}: {one_line(error)}") from None
    if missing := sorted(report["missing_keys"]):
        logger.warning("model %s has no %s: newly initialised", folder, ", ".join(missing))
    return backbone.float()


@contextlib.contextmanager
def no_progress_bar():
    """Keeps transformers' bars out of a run's output while a model is read or written."""
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()


def load_backbone(config: Config, vocabulary: dict[str, int], pad_token_id: int) -> nn.Module:
    """The backbone of a run: ``model.model_name_or_path``, or from scratch without one.

    Args:
        config: the run's configuration.
        vocabulary: ids by token, of the data folder's tokenizer.
        pad_token_id: of the same.
    Raises:
        ConfigError: the folder cannot be used, its shape is not the one asked for, or its
            positions are too few for the sequences.
        DataError: its vocabulary is not the tokenizer's.
    """
    folder = config.model.model_name_or_path
    if folder is None:
        backbone = build_backbone(config, len(vocabulary), pad_token_id)
    else:
        backbone = load_pretrained(folder, config.model.attn_implementation)
        _refuse_another_shape(config.model, backbone.config)
        _refuse_another_vocabulary(folder, backbone.config.vocab_size, vocabulary)
    if config.data.max_seq_length > max_positions(backbone.config):
        raise ConfigError(
            f"data.max_seq_length {config.data.max_seq_length} is above the model's "
            f"{max_positions(backbone.config)} positions"
        )
    return backbone


def _refuse_another_shape(model: ModelConfig, hf_config) -> None:
    """Refuses keys for a model from scratch that are neither their defaults nor the folder's.

    A default is let through: a run's ``config.json`` has every key, asked for or not.
    """
    for name in FROM_SCRATCH:
        asked, own = getattr(model, name), getattr(hf_config, name)
        if name == "max_position_embeddings":
            own = max_positions(hf_config)
        if asked not in (getattr(ModelConfig, name), own):
            raise ConfigError(
                f"model.{name} {asked} is for a model from scratch: that of model_name_or_path "
                f"{model.model_name_or_path} has {own}"
            )


def _refuse_another_vocabulary(folder: str | Path, size: int, vocabulary: dict[str, int]) -> None:
    """Refuses data whose token ids are not the model's: it would train, on noise."""
    if size != len(vocabulary):
        raise DataError(
            f"model {folder} has a vocabulary of {size} but the data folder's tokenizer one of "
            f"{len(vocabulary)}: prepare the data with the model's tokenizer"
        )
    if not has_tokenizer(folder):
        logger.warning(
            "model %s has no tokenizer in its folder: of its vocabulary only the size is known "
            "to be the data folder's",
            folder,
        )
        return
    own = load_tokenizer(folder).get_vocab()
    other = sorted(
        (number, token) for token, number in own.items() if vocabulary.get(token) != number
    )
    if other:
        number, token = other[0]
        raise DataError(
            f"model {folder} and the data folder have different vocabularies of {size} tokens (the "
            f"model's {number} is {token!r}; {len(other)} differ): prepare the data with the "
            "model's tokenizer"
        )


def max_positions(hf_config) -> int:
    """Longest sequence, in tokens, that the position table allows."""
    offset = hf_config.pad_token_id + 1 if hf_config.model_type == "roberta" else 0
    return hf_config.max_position_embeddings - offset


def encode(
    backbone: nn.Module,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    packing: Packing | None = None,
) -> torch.Tensor:
    """Last hidden states [B, S, hidden] from word embeddings [B, S, hidden].

    With the batch's ``packing``, and a backbone that takes it (``install_packed_attention``), pads
    cost nothing and their states are zeros; without, they are whatever the layers make of them.
    """
    hf_config = backbone.config
    if hf_config.model_type == "roberta":
        # From embeddings alone RoBERTa would number the pads too; this is what it does from ids.
        mask = attention_mask.long()
        position_ids = mask.cumsum(1) * mask + hf_config.pad_token_id
    else:
        position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
    if packing is not None:
        return encode_packed(backbone, inputs_embeds, position_ids, packing)
    return backbone.base_model(
        inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids
    )[0]


class MaskedLanguageModel(nn.Module):
    """A backbone alone, without injection and memory: what anyone gets from an exported folder.

    Args:
        backbone: BertForMaskedLM or RobertaForMaskedLM.
        unpad: encode real tokens only, where the backbone's attention can.
    """

    def __init__(self, backbone: nn.Module, unpad: bool = True):
        super().__init__()
        self.backbone = backbone
        self._unpad = unpad and install_packed_attention(backbone)

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.backbone.get_input_embeddings()

    @property
    def hidden_size(self) -> int:
        return self.backbone.config.hidden_size

    def last_hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Last states [B, S, hidden] of plain text; anything finite at pads."""
        packing = self._packing(attention_mask)
        return encode(self.backbone, self.word_embeddings(input_ids), attention_mask, packing)

    def _packing(
        self, attention_mask: torch.Tensor, num_tokens: int | None = None
    ) -> Packing | None:
        return Packing.of(attention_mask, num_tokens) if self._unpad else None

    def mlm_logits(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """MLM scores at some positions only.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, S].
            positions: int64 [K], flat into B * S.
        Returns:
            float32 [K, vocabulary].
        """
        states = self.last_hidden_states(input_ids, attention_mask).flatten(0, 1)
        return mlm_head(self.backbone)(states[positions]).float()

    def fingerprint(self) -> str:
        """SHA-256 of the parameters in float32, under Hugging Face's names and layout."""
        digest = hashlib.sha256()
        state = to_hf_state_dict(dict(self.backbone.named_parameters()))
        for name in sorted(state):
            array = state[name].detach().cpu().float().contiguous().numpy()
            digest.update(name.encode() + b"\0" + str(array.shape).encode())
            digest.update(array.data)
        return digest.hexdigest()
