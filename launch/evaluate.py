#!/usr/bin/env python
"""Score a Hugging Face folder: ``python launch/evaluate.py TASK --model DIR --data DIR``."""

import argparse
import json
import os
import sys
from pathlib import Path

from trelm_ds.errors import EXIT_DONE, ConfigError, TrelmError, one_line

TASKS = ("lama", "heldout")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ConfigError(message)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="launch/evaluate.py",
        description="Scores of a masked language model without injection and memory.",
    )
    parser.add_argument(
        "task", choices=TASKS, help="lama: cloze P@1 of facts; heldout: MLM loss of unseen text"
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument(
        "--data", type=Path, required=True, help="prepared data folder (lama: or a probe folder)"
    )
    parser.add_argument("--json", type=Path, help="file for the result; it is printed anyway")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=64)
    parser.add_argument("--eval_batches", type=int, default=64, help="heldout: batches to score")
    parser.add_argument("--device", help="default: the GPU if there is one")
    return parser


def main(argv: list[str] | None = None) -> int:
    try:
        args = build_parser().parse_args(argv)
        result = run(args)
    except TrelmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    text = json.dumps(result, indent=2) + "\n"
    if args.json:
        temporary = args.json.with_name(f".tmp-{args.json.name}")
        temporary.write_text(text)
        os.replace(temporary, args.json)
    print(text, end="")
    return EXIT_DONE


def choose_device(name: str | None):
    """The device called ``name``, tried; without a name the GPU if there is one."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend has its own kinds
        raise ConfigError(f"--device {name}: {one_line(error)}") from None
    return device


def run(args: argparse.Namespace) -> dict:
    if args.json and not args.json.parent.is_dir():
        raise ConfigError(f"--json {args.json}: no such folder")
    for name in ("per_device_eval_batch_size", "eval_batches"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")
    device = choose_device(args.device)

    from trelm_ds.data.tokenizer import load_tokenizer
    from trelm_ds.model import MaskedLanguageModel, load_pretrained

    model = MaskedLanguageModel(load_pretrained(args.model)).to(device)
    tokenizer = load_tokenizer(args.model)
    score = {"lama": score_lama, "heldout": score_heldout}[args.task]
    return {
        "task": args.task,
        "model": args.model.name,
        "data": args.data.name,
        **score(args, model, tokenizer, device),
    }


def score_lama(args, model, tokenizer, device) -> dict:
    from trelm_ds.evaluate import probe_accuracy, read_probe
    from trelm_ds.model import max_positions

    probe = read_probe(args.data, tokenizer, max_positions(model.backbone.config))
    return probe_accuracy(model, probe, device, batch_size=args.per_device_eval_batch_size)


def score_heldout(args, model, tokenizer, device) -> dict:
    from trelm_ds.config import load_config
    from trelm_ds.data.loader import heldout_batches
    from trelm_ds.data.shards import load_manifest
    from trelm_ds.errors import DataError
    from trelm_ds.evaluate import heldout_mlm_loss
    from trelm_ds.knowledge.graph import KnowledgeGraph, KnowledgeTables

    manifest = load_manifest(args.data)
    if manifest["tokenizer"]["vocab_size"] != len(tokenizer):
        raise DataError(
            f"{args.model} has {len(tokenizer)} tokens but the data folder's tokenizer has "
            f"{manifest['tokenizer']['vocab_size']}: losses would not be comparable"
        )
    config = load_config(
        "mlm",
        overrides={
            "data.data_dir": str(args.data),
            "data.max_seq_length": manifest["max_seq_length"],
            "train.per_device_train_batch_size": args.per_device_eval_batch_size,
            "train.eval_batches": args.eval_batches,
        },
    )
    batches = heldout_batches(
        config, args.data, 0, 1, KnowledgeGraph.load(args.data), KnowledgeTables.load(args.data)
    )
    loss, tokens = heldout_mlm_loss(model, batches, device)
    if not tokens:
        raise DataError(f"{args.data}: its held-out split has no text to score")
    return {"mlm_loss": loss, "masked_tokens": tokens}


if __name__ == "__main__":
    sys.exit(main())
