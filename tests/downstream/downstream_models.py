"""A tiny encoder with its tokenizer, and toy tasks that it can learn in seconds."""

import json
import random

import torch
from tiny_corpus import SPECIALS, write_tokenizer
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from trelm_ds.data.tokenizer import load_tokenizer

PEOPLE = [f"person{i}" for i in range(6)]
PLACES = [f"place{i}" for i in range(6)]
FILLERS = [f"word{i}" for i in range(10)]
VOCABULARY = [*SPECIALS, *PEOPLE, *PLACES, *FILLERS]


def save_tiny_model(folder, kind="bert", layers=1):
    """A random model of the field's architecture and its tokenizer, as a Hugging Face folder."""
    torch.manual_seed(3)
    shape = {
        "vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": layers,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40,
        "pad_token_id": 0, "initializer_range": 0.1, "hidden_dropout_prob": 0.0,
    }  # fmt: skip
    config, model = {
        "bert": (BertConfig, BertForMaskedLM),
        "roberta": (RobertaConfig, RobertaForMaskedLM),
    }[kind]
    if kind == "roberta":
        shape["type_vocab_size"] = 1
    model(config(**shape)).save_pretrained(folder)
    write_tokenizer(folder, VOCABULARY)
    return folder


def load_tiny(folder):
    from trelm_ds.backbone import load_pretrained

    return load_pretrained(folder), load_tokenizer(folder)


def sentence(rng, first, second):
    """Five words or more with two names, at places 1 and 3."""
    tokens = [rng.choice(FILLERS), first, rng.choice(FILLERS), second]
    return tokens + [rng.choice(FILLERS) for _ in range(rng.randint(1, 6))]


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_typing(folder, sizes=(128, 48)):
    """The mention is a person or a place, and some are groups; the other name says nothing."""
    rng = random.Random(0)
    for split, size in zip(("train", "dev"), sizes, strict=True):
        records = []
        for _ in range(size):
            kind, names = rng.choice([("person", PEOPLE), ("place", PLACES)])
            tokens = sentence(rng, rng.choice(names), rng.choice(PEOPLE + PLACES))
            records.append(
                {
                    "left_context_token": tokens[:1],
                    "mention_span": tokens[1],
                    "right_context_token": tokens[2:],
                    "y_str": [kind] + ["group"] * tokens[1].endswith(("0", "1")),
                }
            )
        write_lines(folder / f"{split}.jsonl", records)


def write_relation(folder, sizes=(128, 48)):
    """Equal sentences; the label says which of the two names is marked as the head."""
    rng = random.Random(1)
    for split, size in zip(("train", "val"), sizes, strict=True):
        records = []
        for _ in range(size):
            tokens = sentence(rng, rng.choice(PEOPLE), rng.choice(PLACES))
            head, tail, label = rng.choice([(1, 3, "lives in"), (3, 1, "home of")])
            records.append(
                {
                    "token": tokens,
                    "h": {"pos": [head, head + 1]},
                    "t": {"pos": [tail, tail + 1]},
                    "relation": label,
                }
            )
        write_lines(folder / f"{split}.jsonl", records)


def write_glue(folder, sizes=(128, 48)):
    """SST-2 and STS-B: 1 where the names are of people, 0 where they are of places."""
    rng = random.Random(2)
    for task in ("SST-2", "STS-B"):
        (folder / task).mkdir(parents=True)
    for split, size in zip(("train", "dev"), sizes, strict=True):
        sst, sts = ["sentence\tlabel"], ["sentence1\tsentence2\tscore"]
        for _ in range(size):
            label, names = rng.choice([(1, PEOPLE), (0, PLACES)])
            tokens = sentence(rng, rng.choice(names), rng.choice(names))
            sst.append(f"{' '.join(tokens)}\t{label}")
            sts.append(f"{' '.join(tokens[:2])}\t{' '.join(tokens[2:])}\t{label}")
        (folder / "SST-2" / f"{split}.tsv").write_text("\n".join(sst) + "\n")
        (folder / "STS-B" / f"{split}.tsv").write_text("\n".join(sts) + "\n")
