"""One typed configuration: preset < file < flags < ``--set``, unknown keys are errors.

A run is described by eight sections. Each is a dataclass whose field comments, and texts for
``--help``, are its reference; the paper's symbol stands in brackets. Values come from, weakest
first: the defaults here, the preset named by ``--method`` (``trelm_ds/presets/NAME.yaml``),
the YAML/JSON file of ``--config``, Hugging Face style flags, and ``--set section.key=value``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from trelm_ds.errors import ConfigError
from trelm_ds.files import write_text

PRESET_DIR = Path(__file__).parent / "presets"

SAMPLING_FORMS = ("natural", "static", "knowledge_state")
INJECTION_FORMS = ("none", "kge", "encoder")
SELECTIONS = ("importance", "long_tail", "frequent", "all", "klt")
ROUTING_FORMS = (
    "none",
    "block",
    "in_backward",
    "exact",
    "quadrature",
    "random",
    "activation",
    "frozen",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _choice(name: str, value, choices) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)
        raise ConfigError(
            f"{name}: {value!r} is not one of {', '.join(map(str, choices))}; "
            f"did you mean {near[0]!r}?"
        )


def _fraction(name: str, value: float, *, open_low: bool = False) -> None:
    low_ok = value > 0 if open_low else value >= 0
    _require(low_ok and value <= 1, f"{name}: {value} must be in {'(' if open_low else '['}0, 1]")


# Tokens of a name that a prepared folder keeps of every entity and relation.
NAME_TOKENS = 8

# Keys of a model from scratch: one from a folder has values of its own.
FROM_SCRATCH = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
)


def _flag(default, text: str):
    """A key that is a command-line flag too; ``text`` is what ``--help`` says of it."""
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class ModelConfig:
    """The backbone: a Hugging Face BERT or RoBERTa, from a local folder or from a config."""

    model_name_or_path: str | None = _flag(
        None,
        "local Hugging Face folder to start from; none: from scratch, by the next keys down to "
        "initializer_range",
    )
    model_type: str = _flag("bert", "bert | roberta")
    hidden_size: int = _flag(128, "width of the hidden states")
    num_hidden_layers: int = _flag(2, "layers of the encoder")
    num_attention_heads: int = _flag(4, "attention heads of a layer")
    intermediate_size: int = _flag(512, "neurons of a layer's FFN")
    max_position_embeddings: int = _flag(512, "longest sequence, in tokens")
    hidden_dropout_prob: float = _flag(0.0, "dropout after embeddings, attention and FFN")
    attention_probs_dropout_prob: float = _flag(0.0, "dropout of attention weights")
    # At 0.02, BERT's at width 768, a narrow model's attention starts all but uniform.
    initializer_range: float | None = _flag(
        None, "standard deviation of the first weights; none: 0.02 * sqrt(768 / hidden_size)"
    )
    attn_implementation: str = _flag("sdpa", "sdpa | eager")
    unpad: bool = _flag(True, "the encoder computes real tokens only; with sdpa")
    gradient_checkpointing: bool = _flag(False, "compute activations twice to keep fewer")

    def __post_init__(self):
        _choice("model.model_type", self.model_type, ("bert", "roberta"))
        _choice("model.attn_implementation", self.attn_implementation, ("sdpa", "eager"))
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        ):
            _require(getattr(self, name) > 0, f"model.{name} must be positive")
        _require(
            self.max_position_embeddings >= 8, "model.max_position_embeddings must be at least 8"
        )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            _fraction(f"model.{name}", getattr(self, name))
        _require(
            self.initializer_range is None or self.initializer_range > 0,
            "model.initializer_range must be positive",
        )
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"model.hidden_size {self.hidden_size} is not a multiple of "
            f"model.num_attention_heads {self.num_attention_heads}",
        )


@dataclass(kw_only=True)
class DataConfig:
    """Where the sequences come from and how they are masked."""

    data_dir: str | None = _flag(
        None, "folder written by launch/prepare.py; none: the embedded sample corpus"
    )
    max_seq_length: int = _flag(128, "tokens of the longest sequence; at least the data folder's")
    mlm_probability: float = _flag(0.15, "share of text tokens that are MLM targets (80/10/10)")
    mention_mask_probability: float | None = _flag(
        0.4, "chance that a whole, not injected entity mention is masked; none: like any text"
    )
    num_workers: int = _flag(1, "loader processes per rank; 0 reads in the training process")
    pad_to_multiple_of: int = _flag(8, "a batch's length in tokens is rounded up to a multiple")
    # Counted each time that the run meets one.
    max_damaged_samples: int = _flag(
        0,
        "damaged samples that an empty sequence replaces; one more ends the run, with a checkpoint",
    )

    def __post_init__(self):
        _fraction("data.mlm_probability", self.mlm_probability, open_low=True)
        if self.mention_mask_probability is not None:
            _fraction("data.mention_mask_probability", self.mention_mask_probability)
        _require(self.max_seq_length >= 8, "data.max_seq_length must be at least 8")
        _require(self.num_workers >= 0, "data.num_workers must not be negative")
        _require(self.pad_to_multiple_of >= 1, "data.pad_to_multiple_of must be at least 1")
        _require(self.max_damaged_samples >= 0, "data.max_damaged_samples must not be negative")


@dataclass(kw_only=True)
class SamplingConfig:
    """Which rows a batch holds: the corpus as it is, or what is not known yet first."""

    # natural: sentences as often as the corpus has them; static: every entity as often as any
    # other; knowledge_state: entities the model does not know more often.
    form: str = "natural"
    natural_share: float = 0.25  # of the text rows, in natural order all the same; not for natural
    floor: float = 0.05  # an entity's weight is floor + (1 - K)^temperature, K of knowledge_state
    temperature: float = 1.0
    refresh_steps: int = 200  # steps from one table of weights to the next
    discount: float = 0.2  # of K, the moving average of p(gold) over an entity's masked mentions
    knowledge_rows: float = 0.0  # share of the rows that are packed triples instead of text
    knowledge_row_triples: int = 4  # most triples in such a row

    def __post_init__(self):
        _choice("sampling.form", self.form, SAMPLING_FORMS)
        _fraction("sampling.natural_share", self.natural_share)
        # Rows are drawn by rejection, which takes about 1 / floor tries once all is known.
        _require(0.001 <= self.floor <= 1, "sampling.floor must be in [0.001, 1]")
        _require(self.temperature > 0, "sampling.temperature must be positive")
        _require(self.refresh_steps >= 2, "sampling.refresh_steps must be at least 2")
        _fraction("sampling.discount", self.discount, open_low=True)
        _require(
            0 <= self.knowledge_rows < 1,
            "sampling.knowledge_rows must be in [0, 1): text rows must be left",
        )
        _require(
            self.knowledge_row_triples >= 1, "sampling.knowledge_row_triples must be at least 1"
        )


@dataclass(kw_only=True)
class InjectionConfig:
    """Which mentions get knowledge at the input, and in which form (section 3.1, Eqs. 1 and 7)."""

    form: str = "kge"  # kge: TransE vectors; encoder: shared encoder on texts (DKPLM); none
    selection: str = "importance"  # importance (Eq. 1) | klt (DKPLM) | long_tail | frequent | all
    quantile: float | None = (
        None  # importance threshold as a quantile; None: the sentence's mean SI
    )
    max_per_128_tokens: int = 4  # K
    probability: float = 1.0  # chance that an eligible mention is injected in an epoch
    long_tail_words: bool = True  # rare word types are memory keys too (Fig. 2)
    # Tokens of an entity's or relation's text in form `encoder`, specials included.
    text_length: int = NAME_TOKENS + 2

    def __post_init__(self):
        _choice("injection.form", self.form, INJECTION_FORMS)
        _choice("injection.selection", self.selection, SELECTIONS)
        _fraction("injection.probability", self.probability)
        if self.quantile is not None:
            _fraction("injection.quantile", self.quantile)
        _require(
            3 <= self.text_length <= NAME_TOKENS + 2,
            f"injection.text_length must be 3 to {NAME_TOKENS + 2}: prepared folders keep "
            f"{NAME_TOKENS} tokens of a name",
        )
        _require(self.max_per_128_tokens >= 1, "injection.max_per_128_tokens must be at least 1")


@dataclass(kw_only=True)
class DecodingConfig:
    """Contrastive knowledge assessing: decode the other entity (Eqs. 2 and 3)."""

    enabled: bool = True
    loss_weight: float = 0.5  # theta; multiplies MLM, 1 - theta multiplies CKA
    scale: float = 1.0  # delta
    max_tokens: int = NAME_TOKENS  # T
    num_negatives: int = 64  # N, shared by the global batch of a step
    hard_negatives: int = 0  # of them, tokens of entities near the gold one in memory space
    hard_negative_refresh_steps: int = 500  # a new table of neighbours every so many steps
    unigram_power: float = 0.75  # Q(y) ~ count(y) ** power
    triple: str = "same"  # same as injected | different (when the mention has another) | all
    max_triples: int = 8  # per mention with triple: all
    mentions: str = "selected"  # selected by injection.selection and its cap | all entity mentions
    # Share of the CKA term that goes to choosing the whole entity among others; 0: tokens alone.
    entity_weight: float = 0.0
    entity_negatives: int = 1024  # entities drawn for a step by count ** unigram_power, for all
    # Most entities a micro-batch's triples choose among: its own answers, the drawn negatives,
    # and, as far as there is room, its mentions and the answers' neighbours (hard_negatives > 0).
    entity_candidates: int = 4096

    def __post_init__(self):
        _fraction("decoding.loss_weight", self.loss_weight)
        _choice("decoding.triple", self.triple, ("same", "different", "all"))
        _choice("decoding.mentions", self.mentions, ("selected", "all"))
        _fraction("decoding.entity_weight", self.entity_weight)
        _require(
            1 <= self.entity_negatives < self.entity_candidates,
            "decoding.entity_negatives must be at least 1 and below decoding.entity_candidates",
        )
        _require(
            1 <= self.max_tokens <= NAME_TOKENS,
            f"decoding.max_tokens must be 1 to {NAME_TOKENS}: prepared folders keep that many of "
            "a name",
        )
        _require(self.max_triples >= 1, "decoding.max_triples must be at least 1")
        _require(self.scale != 0, "decoding.scale must not be 0: no relation would be told apart")
        _require(self.unigram_power >= 0, "decoding.unigram_power must not be negative")
        _require(
            0 <= self.hard_negatives < self.num_negatives,
            "decoding.hard_negatives must be below decoding.num_negatives",
        )
        _require(
            self.hard_negative_refresh_steps >= 2,
            "decoding.hard_negative_refresh_steps must be at least 2",
        )


@dataclass(kw_only=True)
class MemoryConfig:
    """Knowledge-augmented memory bank (Eqs. 4 to 8)."""

    enabled: bool = True
    half_window: int = 16  # k, tokens on either side of the mention
    discount: float = 0.1  # gamma of Eq. 5
    weight: float = 0.5  # lambda_0 of Eq. 7
    decay: float = 2.0  # beta of Eq. 8
    virtual_epochs: int = 8  # runs of fewer than 4 epochs: q counts total_steps / virtual_epochs
    off_fraction: float = 0.05  # lambda is 0 for this last share of the run
    rescale: str = "rms"  # rms: rows scaled to the RMS of the word embeddings; literal: as stored
    ema: str = "per_occurrence"  # per_occurrence | per_step, for m mentions in one global batch
    paper_norm: bool = False  # divide Eq. 4 by the printed 2k + r - l even at the sequence's ends
    device: str = "auto"  # auto: where the model is; cpu
    virtual_shards: int = 1024
    max_gib: float | None = None  # refuse to start if a rank's shard and buffers need more

    def __post_init__(self):
        _choice("memory.rescale", self.rescale, ("rms", "literal"))
        _choice("memory.ema", self.ema, ("per_occurrence", "per_step"))
        _choice("memory.device", self.device, ("auto", "cpu"))
        _require(0 < self.discount < 1, "memory.discount must be in (0, 1)")
        _fraction("memory.weight", self.weight)
        _fraction("memory.off_fraction", self.off_fraction)
        _require(self.decay >= 1, "memory.decay must be at least 1")
        _require(self.half_window >= 0, "memory.half_window must not be negative")
        for name in ("virtual_epochs", "virtual_shards"):
            _require(getattr(self, name) >= 1, f"memory.{name} must be at least 1")
        _require(self.max_gib is None or self.max_gib > 0, "memory.max_gib must be positive")


@dataclass(kw_only=True)
class RoutingConfig:
    """Dynamic knowledge routing (Eqs. 9 to 12)."""

    form: str = "none"
    kept_fraction: float = 0.1  # rho, of the intermediate neurons, per layer
    multiple_of: int = 8  # kept neurons are rounded up to a multiple of this
    score: str = "signed"  # signed (Eq. 9) | abs_gradient; used by in_backward and block
    paths: str = "mid"  # mid | full (Eq. 12)
    scope: str = "ffn"  # ffn: everything else trains; strict: paths, injection, decoder, head only
    input_gradient: str = "exact"  # exact | path: dX through the kept neurons alone
    start: float = 0.0  # fraction of the run that trains densely first
    rotation_steps: int = 50  # R, block only; 0: one fixed block
    floor: float = 0.25  # share of rotations that take the block left out longest
    score_steps: int = 5  # block only: steps from one reading of a layer's scores to the next
    attribution_steps: int = 20  # m of Eq. 11, for form and audits exact
    quadrature_nodes: int = 2  # Gauss-Legendre nodes, for form and audits quadrature
    max_targets: int | None = None  # mentions per micro-batch attributed by exact / quadrature
    threshold: float | None = None  # also drop neurons below this share of the largest score
    audit_steps: int = 0  # compare the paths with audit_form's every so many steps; 0: never
    audit_form: str = "quadrature"  # quadrature | exact (Eq. 11 with attribution_steps points)
    truncated_depth: float = 0.0  # share of the layers, lowest first, that late backwards skip
    truncate_start: float = 0.4  # fraction of the run after which they do
    compact_gradients: bool = False  # ranks exchange path rows alone; without ZeRO only

    def __post_init__(self):
        _choice("routing.form", self.form, ROUTING_FORMS)
        _choice("routing.score", self.score, ("signed", "abs_gradient"))
        _choice("routing.paths", self.paths, ("mid", "full"))
        _choice("routing.scope", self.scope, ("ffn", "strict"))
        _choice("routing.audit_form", self.audit_form, ("quadrature", "exact"))
        _choice("routing.input_gradient", self.input_gradient, ("exact", "path"))
        _fraction("routing.kept_fraction", self.kept_fraction, open_low=True)
        _fraction("routing.start", self.start)
        _fraction("routing.floor", self.floor)
        _fraction("routing.truncated_depth", self.truncated_depth)
        _require(self.truncated_depth < 1, "routing.truncated_depth must leave a layer to train")
        _fraction("routing.truncate_start", self.truncate_start)
        _require(self.multiple_of >= 1, "routing.multiple_of must be at least 1")
        _require(self.attribution_steps >= 1, "routing.attribution_steps must be at least 1")
        _require(self.score_steps >= 1, "routing.score_steps must be at least 1")
        _require(self.quadrature_nodes >= 1, "routing.quadrature_nodes must be at least 1")
        if self.threshold is not None:
            _fraction("routing.threshold", self.threshold)
        for name in ("rotation_steps", "audit_steps"):
            _require(getattr(self, name) >= 0, f"routing.{name} must not be negative")
        _require(
            self.max_targets is None or self.max_targets >= 1,
            "routing.max_targets must be at least 1",
        )
        _require(
            not (self.form == "block" and self.paths == "full"),
            "routing.form block keeps whole neurons: use routing.paths mid with it",
        )


@dataclass(kw_only=True)
class TrainConfig:
    """Optimisation, the run's length, and what is written when. Hugging Face's names."""

    output_dir: str | None = _flag(
        None, "the run's folder; none: outputs/METHOD, numbered where that exists"
    )
    max_steps: int = _flag(2400, "optimizer steps")
    max_hours: float | None = _flag(
        None, "end by the training clock, which evaluation and queue time are not on; none: never"
    )
    per_device_train_batch_size: int = _flag(24, "sequences of a micro-batch")
    gradient_accumulation_steps: int = _flag(1, "micro-batches of a step, on each rank")
    learning_rate: float = _flag(
        2e-3,
        "its peak; the default is a small model's from scratch, BERT's size wants 1e-4 or less",
    )
    weight_decay: float = _flag(0.01, "of AdamW")
    adam_beta1: float = _flag(0.9, "of AdamW")
    adam_beta2: float = _flag(0.98, "of AdamW")
    adam_epsilon: float = _flag(1e-6, "of AdamW")
    max_grad_norm: float = _flag(1.0, "longer gradients are clipped to it; 0: no clipping")
    object_loss_share: float | None = _flag(
        None,
        "share of the MLM loss for the tokens of whole masked entity mentions, the rest for text "
        "(each a mean over tokens); none: every masked token weighs the same",
    )
    lr_scheduler_type: str = _flag("linear", "linear | cosine | constant, after the warm-up")
    warmup_ratio: float = _flag(0.1, "share of the run in which the learning rate rises")
    min_lr_ratio: float = _flag(0.0, "share of the learning rate that is left at the end")
    seed: int = _flag(42, "of weights, data order, masks and dropout")
    bf16: bool | None = _flag(None, "compute in bfloat16; none: on GPUs that have it")
    logging_steps: int = _flag(50, "steps from one line of metrics to the next")
    eval_steps: int = _flag(
        400, "steps from one evaluation to the next; 0: only at the start and the end"
    )
    eval_batches: int = _flag(16, "of 32 held-out sequences, per evaluation")
    eval_probes: int | None = _flag(
        None, "facts asked per evaluation, evenly spaced; none: all there are"
    )
    save_steps: int = _flag(800, "steps from one checkpoint to the next; 0: only at the end")
    save_total_limit: int = _flag(2, "checkpoints kept, the newest")
    resume_from_checkpoint: str | None = _flag(
        None, "latest | a checkpoint folder DIR; none: a new run"
    )
    report_to: str = _flag("none", "tensorboard | wandb | csv | none, beside metrics.jsonl")
    export: bool = _flag(True, "write the trained model to OUTPUT_DIR/hf at the end")

    def __post_init__(self):
        _choice("train.lr_scheduler_type", self.lr_scheduler_type, ("linear", "cosine", "constant"))
        _choice("train.report_to", self.report_to, ("tensorboard", "wandb", "csv", "none"))
        for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"):
            _require(getattr(self, name) >= 1, f"train.{name} must be at least 1")
        for name in ("logging_steps", "eval_batches"):
            _require(getattr(self, name) >= 1, f"train.{name} must be at least 1")
        for name in ("eval_steps", "save_steps", "max_grad_norm", "weight_decay"):
            _require(getattr(self, name) >= 0, f"train.{name} must not be negative")
        _require(self.max_hours is None or self.max_hours > 0, "train.max_hours must be positive")
        _require(
            self.eval_probes is None or self.eval_probes >= 1,
            "train.eval_probes must be at least 1",
        )
        for name in ("learning_rate", "adam_epsilon"):
            _require(getattr(self, name) > 0, f"train.{name} must be positive")
        _require(self.save_total_limit >= 1, "train.save_total_limit must be at least 1")
        _fraction("train.warmup_ratio", self.warmup_ratio)
        if self.object_loss_share is not None:
            _fraction("train.object_loss_share", self.object_loss_share)
        _fraction("train.min_lr_ratio", self.min_lr_ratio)


@dataclass(kw_only=True)
class Config:
    """The resolved configuration of a run."""

    method: str = "trelm"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    injection: InjectionConfig = field(default_factory=InjectionConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        _require(
            not self.decoding.hard_negatives or (self.decoding.enabled and self.memory.enabled),
            "decoding.hard_negatives are found in the memory bank: they need memory.enabled and "
            "decoding.enabled",
        )
        _require(
            self.sampling.form != "knowledge_state"
            or bool(self.data.mention_mask_probability or self.sampling.knowledge_rows),
            "sampling.form knowledge_state measures masked mentions: it needs "
            "data.mention_mask_probability or sampling.knowledge_rows above 0",
        )

    @property
    def uses_mentions(self) -> bool:
        """Whether anything is done with entity mentions; plain MLM looks none up."""
        return self.injection.form != "none" or self.memory.enabled or self.decoding.enabled

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")


SECTIONS = {f.name: f for f in dataclasses.fields(Config) if f.name != "method"}


def _section_type(name: str):
    return typing.get_type_hints(Config)[name]


def known_keys() -> list[str]:
    """Every ``section.key``, for suggestions and ``--help``."""
    return ["method"] + [
        f"{section}.{f.name}"
        for section in SECTIONS
        for f in dataclasses.fields(_section_type(section))
    ]


def nearest_key(key: str) -> str:
    """The known key most like ``key``; a bare name is matched against the last parts too."""
    keys = known_keys()
    longer = [k for k in keys if key and (k.startswith(key) or k.partition(".")[2].startswith(key))]
    if longer:
        return longer[0]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not near:
        tails = {k.rpartition(".")[2]: k for k in keys}
        tail = difflib.get_close_matches(key.rpartition(".")[2], tails, n=1, cutoff=0.0)
        near = [tails[tail[0]]]
    return near[0]


def _convert(key: str, value, hint):
    """``value`` (from YAML, JSON or a flag) as the field's type, or a ConfigError."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() in ("null", "none", "")):
        if type(None) in options:
            return None
        if str not in options:
            raise ConfigError(f"{key}: a value is needed, got {value!r}")
    for option in options:
        if option is bool:
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and value.lower() in ("true", "false", "1", "0", "yes", "no"):
                return value.lower() in ("true", "1", "yes")
        elif option is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            if isinstance(value, str):
                with contextlib.suppress(ValueError):
                    return int(value)
            if isinstance(value, float) and value.is_integer():
                return int(value)
        elif option is float:
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                try:
                    number = float(value)
                except ValueError:
                    continue
                if not math.isfinite(number):
                    raise ConfigError(f"{key}: {value!r} is not a finite number")
                return number
        elif option is str and isinstance(value, (str, int, float)):
            return str(value)
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{key}: {value!r} is not {names}")


def flatten(tree: dict, origin: str) -> dict[str, object]:
    """A nested mapping as ``{"section.key": value}``, unknown keys refused.

    Raises:
        ConfigError: naming ``origin``, the unknown key and the nearest known one.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: expected a mapping of sections, got {type(tree).__name__}")
    flat = {}
    for section, body in tree.items():
        if section == "method":
            flat["method"] = body
        elif section in SECTIONS and isinstance(body, dict):
            flat.update({f"{section}.{key}": value for key, value in body.items()})
        elif section in SECTIONS:
            raise ConfigError(f"{origin}: section {section!r} must be a mapping")
        else:
            raise ConfigError(
                f"{origin}: unknown key {section!r}; did you mean {nearest_key(str(section))!r}?"
            )
    known = set(known_keys())
    for key in flat:
        if key not in known:
            raise ConfigError(f"{origin}: unknown key {key!r}; did you mean {nearest_key(key)!r}?")
    return flat


def read_config_file(path: str | Path) -> dict[str, object]:
    """The flat contents of a YAML or JSON configuration file."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    try:
        tree = yaml.safe_load(path.read_text())  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: not valid YAML or JSON: {' '.join(str(error).split())}"
        ) from None
    return flatten(tree or {}, str(path))


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


def read_preset(name: str) -> dict[str, object]:
    """The flat contents of a method preset; ``base: NAME`` in it inherits another preset."""
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.0)
        raise ConfigError(
            f"--method {name}: no such preset; did you mean {near[0]!r}? "
            f"Known: {', '.join(preset_names())}"
        )
    path = PRESET_DIR / f"{name}.yaml"
    tree = yaml.safe_load(path.read_text()) or {}
    base = tree.pop("base", None)
    flat = read_preset(base) if base else {}
    return flat | flatten(tree, str(path))


def parse_assignment(text: str) -> tuple[str, object]:
    """``section.key=value`` of ``--set``."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: expected section.key=value")
    key = key.strip()
    if key not in known_keys() or key == "method":
        raise ConfigError(f"--set {text}: unknown key {key!r}; did you mean {nearest_key(key)!r}?")
    return key, value.strip()


def build_config(*layers: dict[str, object]) -> Config:
    """Merges flat layers, weakest first, and checks every value.

    Raises:
        ConfigError: a value of the wrong type or outside its range.
    """
    flat: dict[str, object] = {}
    for layer in layers:
        flat.update(layer)
    sections = {}
    for section in SECTIONS:
        cls = _section_type(section)
        hints = typing.get_type_hints(cls)
        values = {}
        for f in dataclasses.fields(cls):
            key = f"{section}.{f.name}"
            if key in flat:
                values[f.name] = _convert(key, flat[key], hints[f.name])
        sections[section] = cls(**values)
    return Config(method=str(flat.get("method", "trelm")), **sections)


def load_config(
    method: str | None = None,
    file: str | Path | None = None,
    overrides: dict[str, object] | None = None,
) -> Config:
    """Defaults < preset < ``file`` < ``overrides`` (flat). ``method`` wins over the file's."""
    from_file = read_config_file(file) if file else {}
    name = method or from_file.get("method") or "trelm"
    return build_config(read_preset(str(name)), from_file, overrides or {}, {"method": name})
