"""Held-out scores without injection and memory: MLM loss and cloze P@1 of facts (LAMA form)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trelm_ds.backbone import max_positions
from trelm_ds.data.tokenizer import load_tokenizer
from trelm_ds.distributed import gather_vector
from trelm_ds.errors import DataError
from trelm_ds.evaluation_mode import evaluation_mode
from trelm_ds.losses import mlm_losses
from trelm_ds.prepare.files import iter_jsonl, iter_lines

MASK = "[MASK]"  # what probe files write, whatever the tokenizer's mask token
SPLITS = ("all", "tail", "graph_only", "text_only", "template", "context")
# Facts that settings may be chosen by, and those that results are reported on: disjoint parts of
# "all". `report_tail` and so on are the reported facts of each split.
PARTS = ("select", "report", *(f"report_{name}" for name in SPLITS[1:]))
SELECT_ONE_IN = 4


def _rounds(mine: int, group) -> int:
    """The largest number of forwards any rank has to make."""
    return int(gather_vector([float(mine)], group)[:, 0].max())


def _idle_forward(model, device) -> None:
    """A forward of one dummy token: under ZeRO-3 each forward is a collective, so a rank that
    has run out of work has to go along."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    model.mlm_logits(ids, torch.ones_like(ids), ids[0])


# -- held-out MLM loss --------------------------------------------------------------------------


def heldout_mlm_loss(
    model, batches: Sequence, device: torch.device | str, group=None
) -> tuple[float, int]:
    """Mean cross-entropy per masked token of fixed batches, nothing injected.

    Args:
        model: ``MaskedLanguageModel``.
        batches: this rank's ``Batch`` objects; ranks may have different numbers of them.
        device: where the model is.
        group: host-side process group (gloo), None for a single process.
    Returns:
        The loss in nats (nan without any masked token), and the number of masked tokens, over
        all ranks.
    """
    total = torch.zeros(2, dtype=torch.float64)
    with evaluation_mode(model), torch.no_grad():
        for i in range(_rounds(len(batches), group)):
            if i >= len(batches):
                _idle_forward(model, device)
                continue
            batch = batches[i].to(device)
            logits = model.mlm_logits(batch.input_ids, batch.attention_mask, batch.mlm_positions)
            total[0] += mlm_losses(logits, batch.mlm_labels).double().sum().cpu()
            total[1] += len(batch.mlm_labels)
    loss, tokens = gather_vector(total.tolist(), group).sum(0).tolist()
    return (loss / tokens if tokens else math.nan), int(tokens)


def evaluate_heldout(
    model, batches: Sequence, device: torch.device | str, group=None
) -> dict[str, float]:
    """``eval/mlm_loss`` of the held-out split; nothing where the split holds no masked token."""
    loss, tokens = heldout_mlm_loss(model, batches, device, group)
    return {"eval/mlm_loss": loss} if tokens else {}


# -- cloze probe --------------------------------------------------------------------------------


@dataclass
class ProbeRow:
    """One fact as a cloze: ``ids`` hold one mask token, at ``mask``, that stands for ``answer``."""

    relation: str
    ids: list[int]
    mask: int
    answer: int
    spaced: bool
    splits: tuple[str, ...]


@dataclass
class Probe:
    """Tokenized cloze rows and the tokens that are allowed as answers.

    Attributes:
        rows: the facts that can be asked.
        candidates: sorted token ids by ``ProbeRow.spaced``: byte-level tokenizers have one token
            for a word after a space and another for a word that follows a bracket or the start.
        pad_token_id: fills short rows.
        skipped: facts left out, by reason.
    """

    rows: list[ProbeRow]
    candidates: dict[bool, torch.Tensor]
    pad_token_id: int
    skipped: dict[str, int] = field(default_factory=dict)


def single_tokens(tokenizer, words: list[str], spaced: bool) -> list[int]:
    """Token id of each word that is one known token, -1 for the others."""
    if not words:
        return []
    texts = [" " + word for word in words] if spaced else words
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    return [ids[0] if len(ids) == 1 and ids[0] not in special else -1 for ids in encoded]


def load_probes(data_dir: str | Path, model, limit: int | None = None) -> Probe | None:
    """The probe of a prepared folder by the folder's own tokenizer; None if it has no probe.

    Args:
        data_dir: the prepared folder.
        model: ``MaskedLanguageModel`` that will be asked.
        limit: ask about this many facts, evenly spaced, instead of all.
    Raises:
        DataError: see ``read_probe``.
    """
    folder = Path(data_dir)
    if not any((folder / "probe").glob("*.jsonl")):
        return None
    tokenizer = load_tokenizer(folder / "tokenizer")
    probe = read_probe(folder, tokenizer, max_positions(model.backbone.config))
    if limit is not None and len(probe.rows) > limit:
        probe.rows = [probe.rows[i * len(probe.rows) // limit] for i in range(limit)]
    return probe


def read_probe(data_dir: str | Path, tokenizer, max_length: int | None = None) -> Probe:
    """Reads ``probe/*.jsonl`` (and ``candidates.txt``) of a prepared folder.

    LAMA's rules: an answer has to be a single token of the vocabulary, and one of the candidates
    where there is a list of them; without a list every token but the specials is a candidate.

    Args:
        data_dir: a prepared folder, or the folder of probe files itself.
        tokenizer: of the model that is asked.
        max_length: longest sequence in tokens; facts that are longer are left out.
    Raises:
        DataError: no probe file, a line that is not a probe record, or nothing left to ask.
    """
    folder = Path(data_dir)
    folder = folder / "probe" if (folder / "probe").is_dir() else folder
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise DataError(f"{folder}: no probe files (*.jsonl); docs/evaluation.md has their form")
    records = [record for file in files for record in _read_records(file)]
    words = folder / "candidates.txt"
    listed = [line for _, line in iter_lines(words)] if words.is_file() else None
    candidates = {}
    for spaced in (False, True):
        if listed is None:
            ids = set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
        else:
            ids = set(single_tokens(tokenizer, [w for w in listed if w.strip()], spaced)) - {-1}
        candidates[spaced] = torch.tensor(sorted(ids), dtype=torch.int64)
    rows, skipped = _probe_rows(records, tokenizer, candidates, max_length)
    if not rows:
        raise DataError(f"{folder}: none of {len(records)} facts can be asked: {skipped}")
    return Probe(rows, candidates, tokenizer.pad_token_id, skipped)


_FIELDS = {
    "relation": str, "text": str, "answer": str, "set": str, "tail": bool, "graph_only": bool,
}  # fmt: skip


def _read_records(path: Path) -> Iterator[dict]:
    for where, record in iter_jsonl(path):
        for name, kind in _FIELDS.items():
            if type(record.get(name)) is not kind:
                raise DataError(f"{where}: {name!r} is missing or not {kind.__name__}")
        if not isinstance(record.get("text_only", False), bool):  # folders before it have none
            raise DataError(f"{where}: 'text_only' is not bool")
        if record["text"].count(MASK) != 1:
            raise DataError(f"{where}: the text must hold {MASK} exactly once")
        if record["set"] not in ("template", "context"):
            raise DataError(f"{where}: set {record['set']!r} is unknown")
        yield record


def is_selection_fact(record: dict) -> bool:
    """Whether a probe record is one that settings are chosen by, and not one that is reported.

    About a quarter are. A hash of the fact (relation, subject, object) decides, so that a fact's
    template and its sentences fall on the same side, in every run, on every machine, and in every
    folder that names its entities by id.
    """
    if "object_id" in record and "subject_id" in record:
        subject, object_ = record["subject_id"], record["object_id"]
    else:  # a folder of an earlier version, or LAMA's own files, which name no entities
        subject = record.get("subject", record["text"])
        object_ = record.get("object", record["answer"])
    fact = f"{record['relation']}\t{subject}\t{object_}"
    digest = hashlib.blake2b(fact.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % SELECT_ONE_IN == 0


def _probe_rows(records, tokenizer, candidates, max_length) -> tuple[list[ProbeRow], dict]:
    spaced = [r["text"].split(MASK)[0][-1:].isspace() for r in records]
    answers = [-1] * len(records)
    for kind in (False, True):
        index = [i for i, s in enumerate(spaced) if s == kind]
        tokens = single_tokens(tokenizer, [records[i]["answer"] for i in index], kind)
        for i, token in zip(index, tokens, strict=True):
            answers[i] = token
    allowed = {kind: set(ids.tolist()) for kind, ids in candidates.items()}
    texts = [r["text"].replace(MASK, tokenizer.mask_token) for r in records]
    encoded = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    rows, skipped = [], {"not_one_token": 0, "not_a_candidate": 0, "too_long": 0}
    for i, record in enumerate(records):
        ids = encoded[i]
        if answers[i] < 0:
            skipped["not_one_token"] += 1
        elif answers[i] not in allowed[spaced[i]]:
            skipped["not_a_candidate"] += 1
        elif max_length is not None and len(ids) > max_length:
            skipped["too_long"] += 1
        else:
            splits = ["all", record["set"]]
            splits += [name for name in ("tail", "graph_only", "text_only") if record.get(name)]
            if is_selection_fact(record):
                splits.append("select")
            else:
                splits += ["report", *(f"report_{name}" for name in splits[1:])]
            mask = ids.index(tokenizer.mask_token_id)
            rows.append(
                ProbeRow(record["relation"], ids, mask, answers[i], spaced[i], tuple(splits))
            )
    return rows, skipped


def probe_accuracy(
    model,
    probe: Probe,
    device: torch.device | str,
    *,
    rank: int = 0,
    world_size: int = 1,
    group=None,
    batch_size: int = 64,
) -> dict:
    """P@1 of every split: macro average over relations (LAMA's) and micro average over facts.

    Args:
        model: ``MaskedLanguageModel``.
        probe: the same on every rank.
        device: where the model is.
        rank, world_size: the batches are dealt out to the ranks.
        group: host-side process group (gloo), None for a single process.
        batch_size: rows of one forward.
    Returns:
        ``splits``: {name: {p1, p1_micro, facts, relations}} (a split without facts is left out);
        ``relations``: {relation: {p1, facts}}; ``skipped``: as ``Probe.skipped``.
    """
    relations = sorted({row.relation for row in probe.rows})
    number = {relation: i for i, relation in enumerate(relations)}
    names = SPLITS + PARTS
    # [relation, split, (hits, facts)]; a list, as it is added to once per row and split
    counts = [[[0.0, 0.0] for _ in names] for _ in relations]
    column = {name: i for i, name in enumerate(names)}
    order = sorted(range(len(probe.rows)), key=lambda i: len(probe.rows[i].ids))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    mine = batches[rank::world_size]
    with evaluation_mode(model), torch.no_grad():
        for i in range(_rounds(len(mine), group)):
            if i >= len(mine):
                _idle_forward(model, device)
                continue
            rows = [probe.rows[j] for j in mine[i]]
            for row, hit in zip(rows, _hits(model, rows, probe, device), strict=True):
                for split in row.splits:
                    cell = counts[number[row.relation]][column[split]]
                    cell[0] += hit
                    cell[1] += 1
    flat = torch.tensor(counts, dtype=torch.float64).flatten().tolist()
    counts = gather_vector(flat, group).sum(0).view(len(relations), len(names), 2)
    splits = {}
    for i, name in enumerate(names):
        hits, facts = counts[:, i].unbind(1)
        asked = facts > 0
        if asked.any():
            splits[name] = {
                "p1": (hits[asked] / facts[asked]).mean().item(),
                "p1_micro": (hits.sum() / facts.sum()).item(),
                "facts": int(facts.sum()),
                "relations": int(asked.sum()),
            }
    by_relation = {
        relation: {"p1": (hits / facts).item(), "facts": int(facts)}
        for relation, (hits, facts) in zip(relations, counts[:, 0], strict=True)
    }
    return {"splits": splits, "relations": by_relation, "skipped": probe.skipped}


def _hits(model, rows: list[ProbeRow], probe: Probe, device) -> list[bool]:
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), probe.pad_token_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
    positions = torch.tensor([i * width + row.mask for i, row in enumerate(rows)])
    logits = model.mlm_logits(ids.to(device), mask.to(device), positions.to(device))
    hits = [False] * len(rows)
    for spaced, candidates in probe.candidates.items():
        picked = [i for i, row in enumerate(rows) if row.spaced == spaced]
        if picked:
            candidates = candidates.to(device)
            best = candidates[logits[picked][:, candidates].argmax(1)].tolist()
            for i, token in zip(picked, best, strict=True):
                hits[i] = token == rows[i].answer
    return hits


def evaluate_probes(
    model,
    probe: Probe | None,
    device: torch.device | str,
    *,
    rank: int = 0,
    world_size: int = 1,
    group=None,
) -> dict[str, float]:
    """Macro averages over relations; nothing without a probe.

    ``eval/probe_p1[_SPLIT]`` of all facts; ``eval/select_p1`` of the facts settings are chosen by;
    ``eval/report_p1[_SPLIT]`` of the others.
    """
    if probe is None:
        return {}
    result = probe_accuracy(model, probe, device, rank=rank, world_size=world_size, group=group)
    return {metric_name(name): values["p1"] for name, values in result["splits"].items()}


def metric_name(split: str) -> str:
    """The key of a split's P@1 in ``metrics.jsonl``."""
    if split in PARTS:
        part, _, name = split.partition("_")
        return f"eval/{part}_p1" + (f"_{name}" if name else "")
    return "eval/probe_p1" if split == "all" else f"eval/probe_p1_{split}"
