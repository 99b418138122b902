"""Encoding without pads: the real tokens of a batch as one packed row [1, T, hidden].

Everything in an encoder layer but attention works token by token, so Hugging Face's layers run on
the packed row as they are. Self-attention, which has to stay within each sequence, finds the
``Packing`` in the place of its mask, which every release of transformers hands down to it, and in
activation checkpointing back to it; with an ordinary mask it is transformers' own. (Its table of
attention functions would do as well, but BERT asks it from transformers 5 on only.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

FLASH_HEAD_SIZES = (8, 128)  # a multiple of the first, at most the second


@dataclass(frozen=True)
class Packing:
    """Where the T real tokens of a padded batch [B, S] are.

    A dataclass and not a tuple: ZeRO-3's and checkpointing's searches for tensors leave it alone.

    Attributes:
        index: int64 [T], their flat positions in B * S, ascending.
        offsets: int32 [B + 1], row b's tokens are [offsets[b], offsets[b + 1]) of the packed row.
        mask: bool [B, 1, 1, S], True at real tokens.
    """

    index: torch.Tensor
    offsets: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, attention_mask: torch.Tensor, num_tokens: int | None = None) -> Packing:
        """The packing of a batch, on the mask's device.

        Args:
            attention_mask: int64 [B, S], 1 at real tokens.
            num_tokens: T; with it nothing waits for a GPU, without it the mask is asked.
        """
        real = attention_mask.bool()
        if num_tokens is None:
            num_tokens = int(real.sum())
        # A stable sort and not nonzero, whose length a GPU would have to tell the host.
        index = real.flatten().argsort(descending=True, stable=True)[:num_tokens]
        offsets = nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
        return cls(index, offsets, real[:, None, None])

    @property
    def has_pads(self) -> bool:
        return len(self.index) < self.mask.numel()

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Real tokens [T, ...] of [B, S, ...]."""
        return padded.flatten(0, 1).index_select(0, self.index)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[B, S, ...] of real tokens [T, ...], zeros at pads."""
        batch, _, _, length = self.mask.shape
        padded = packed.new_zeros(batch * length, *packed.shape[1:])
        return padded.index_copy(0, self.index, packed).view(batch, length, *packed.shape[1:])

    def rows(self, flat_positions: torch.Tensor) -> torch.Tensor:
        """Rows of the packed sequence, int64 [P], of real tokens' flat positions in B * S."""
        return self.mask.flatten().cumsum(0)[flat_positions] - 1


class _PackedSelfAttention:
    """Mixed into Hugging Face's self-attention of BERT or RoBERTa: takes a Packing for a mask."""

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        if not isinstance(attention_mask, Packing):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        query, key, value = (
            linear(hidden_states[0]).unflatten(-1, (self.num_attention_heads, -1))
            for linear in (self.query, self.key, self.value)
        )
        dropout = self.dropout.p if self.training else 0.0
        output = packed_attention(query, key, value, attention_mask, dropout)
        return output.flatten(1)[None], None


@functools.cache
def _packed_class(attention: type[nn.Module]) -> type[nn.Module]:
    return type(f"Packed{attention.__name__}", (_PackedSelfAttention, attention), {})


def install_packed_attention(backbone: nn.Module) -> bool:
    """Lets the self-attention of a Hugging Face BERT or RoBERTa take packed rows, in place.

    Parameters, their names and what is done with ordinary masks stay as they are.

    Returns:
        False, and nothing is changed, for attention other than SDPA or relative positions.
    """
    config = backbone.config
    relative = getattr(config, "position_embedding_type", None) not in (None, "absolute")
    if config._attn_implementation != "sdpa" or relative:
        return False
    for layer in backbone.base_model.encoder.layer:
        attention = layer.attention.self
        if not isinstance(attention, _PackedSelfAttention):
            attention.__class__ = _packed_class(type(attention))
    return True


def encode_packed(
    backbone: nn.Module,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor,
    packing: Packing,
) -> torch.Tensor:
    """Last hidden states [B, S, hidden], zeros at pads, computed at real tokens only.

    Args:
        backbone: prepared by ``install_packed_attention``.
        inputs_embeds: word embeddings [B, S, hidden].
        position_ids: int64 [B, S] or [1, S].
        packing: of the batch.
    """
    base = backbone.base_model
    positions = packing.pack(position_ids.expand(inputs_embeds.shape[:2]))[None]
    # The parts and not ``base_model`` itself, which would make a mask of T x T tokens.
    embedded = base.embeddings(
        inputs_embeds=packing.pack(inputs_embeds)[None],
        position_ids=positions,
        token_type_ids=torch.zeros_like(positions),
    )
    return packing.unpack(base.encoder(embedded, attention_mask=packing)[0][0])


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(head size)) v of every head, within every sequence of a packed row.

    Args:
        query, key, value: [T, H, head size].
        packing: of the batch.
        dropout: of the attention probabilities; 0 in evaluation.
    Returns:
        [T, H, head size].
    """
    if _has_flash(query):
        return _flash(query, key, value, packing, dropout)
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        return _by_sequence(query, key, value, packing, dropout)
    output = scaled_dot_product_attention(
        *(packing.unpack(t).transpose(1, 2) for t in (query, key, value)),
        attn_mask=packing.mask if packing.has_pads else None,
        dropout_p=dropout,
    )
    return packing.pack(output.transpose(1, 2))


def _by_sequence(query, key, value, packing: Packing, dropout: float) -> torch.Tensor:
    """One call a sequence: [T, H, head size].

    Each costs a CPU a tenth of a millisecond, which pads to the longest sequence of the batch cost
    several times over (and a mask with them). A GPU would have to tell the host the lengths.
    """
    lengths = packing.offsets.diff().tolist()
    outputs = [
        scaled_dot_product_attention(
            *(t.transpose(0, 1)[None] for t in sequence), dropout_p=dropout
        )
        for sequence in zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
    ]
    return torch.cat([output[0].transpose(0, 1) for output in outputs])


def _has_flash(query: torch.Tensor) -> bool:
    """Whether torch has a variable-length kernel for such a query."""
    multiple, largest = FLASH_HEAD_SIZES
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and size % multiple == 0
        and size <= largest
        and torch.backends.cuda.is_flash_attention_available()
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _flash(query, key, value, packing: Packing, dropout: float) -> torch.Tensor:
    """Flash attention within [offsets[b], offsets[b + 1]): [T, H, head size].

    The operator under SDPA of jagged nested tensors: ``torch.nn.attention.varlen`` has no dropout.
    S bounds the longest sequence and is known to the host.
    """
    longest = packing.mask.shape[-1]
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        packing.offsets,
        packing.offsets,
        longest,
        longest,
        dropout,
        False,  # causal
        False,  # debug mask
    )[0]
