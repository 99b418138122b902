"""``launch/evaluate.py``: scores of a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

from trelm_ds.arguments import LineParser
from trelm_ds.downstream.settings import DEFAULTS, FineTuning
from trelm_ds.errors import EXIT_DONE, ConfigError, TrelmError, one_line, report
from trelm_ds.files import write_text

# task -> (what it is, what --data is)
TASKS = {
    "lama": ("cloze P@1 of facts", "prepared data folder, or a probe folder"),
    "heldout": ("MLM loss of unseen text", "prepared data folder"),
    "typing": ("fine-tune on entity typing: micro-F1", "folder of train and dev or test files"),
    "relation": ("fine-tune on relation classification: F1", "folder of train and dev/test files"),
    "glue": ("fine-tune on GLUE: the tasks' dev scores", "a task's folder, or a folder of them"),
    "neurons": ("knowledge neurons of facts, and their effect", "as for lama"),
}
# flag -> help of the fine-tuning flags, the fields of FineTuning
FINE_TUNING = {
    "epochs": "passes over the training split",
    "batch_size": "examples of an optimizer step",
    "learning_rate": "peak learning rate",
    "seeds": "runs: the mean and the spread over them are reported",
    "max_train_samples": "train on this many, evenly spaced (default: all)",
    "max_eval_samples": "score this many of each split, evenly spaced (default: all)",
    "max_seq_length": "tokens (default: 128, or fewer where the model has fewer positions)",
}


def build_parser() -> argparse.ArgumentParser:
    parser = LineParser(
        prog="launch/evaluate.py",
        description="Scores of a masked language model without injection and memory.",
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, (about, data) in TASKS.items():
        task = tasks.add_parser(name, help=about, description=about)
        task.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
        task.add_argument("--data", type=Path, required=True, help=data)
        task.add_argument("--json", type=Path, help="file for the result; it is printed anyway")
        task.add_argument("--device", default="auto", help="default: the GPU if there is one")
        if name == "neurons":
            task.add_argument("--max_eval_samples", type=int, default=500, help="facts at most")
            continue
        task.add_argument("--per_device_eval_batch_size", type=int, default=64)
        if name in DEFAULTS:
            defaults = asdict(FineTuning()) | DEFAULTS[name]
            for flag, text in FINE_TUNING.items():
                default = defaults[flag]
                text += "" if default is None else f" (default: {default})"
                kind = type(default) if default is not None else int
                task.add_argument(f"--{flag}", type=kind, default=default, help=text)
        else:
            task.add_argument(
                "--eval_batches", type=int, default=64, help="heldout: of 32 sequences"
            )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit code."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("trelm_ds").setLevel(logging.INFO)
    try:
        args = build_parser().parse_args(argv)
        result = run(args)
        text = json.dumps(result, indent=2) + "\n"
        print(text, end="", flush=True)  # first: the file may fail after hours of work
        if args.json:
            write_text(args.json, text)
    except (TrelmError, OSError) as error:
        return report(error)
    return EXIT_DONE


def choose_device(name: str):
    """The device called ``name``, tried; ``auto`` is the GPU if there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend has its own kinds
        raise ConfigError(f"--device {name}: {one_line(error)}") from None
    return device


def run(args: argparse.Namespace) -> dict:
    """The task's scores, as ``--json`` has them."""
    if args.json and not args.json.parent.is_dir():
        raise ConfigError(f"--json {args.json}: no such folder")
    for name in ("per_device_eval_batch_size", "eval_batches", "max_eval_samples"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 1")
    device = choose_device(args.device)
    if args.task in DEFAULTS:
        from trelm_ds.downstream.tasks import fine_tune

        settings = FineTuning(
            **{flag: getattr(args, flag) for flag in FINE_TUNING},
            eval_batch_size=args.per_device_eval_batch_size,
        )
        return named(args) | fine_tune(args.task, args.model, args.data, settings, device)

    from trelm_ds.backbone import MaskedLanguageModel, load_pretrained
    from trelm_ds.data.tokenizer import load_tokenizer

    model = MaskedLanguageModel(load_pretrained(args.model)).to(device)
    tokenizer = load_tokenizer(args.model)
    score = {"lama": score_lama, "heldout": score_heldout, "neurons": score_neurons}[args.task]
    return named(args) | score(args, model, tokenizer, device)


def named(args) -> dict:
    return {"task": args.task, "model": str(args.model), "data": str(args.data)}


def read_facts(args: argparse.Namespace, model, tokenizer):
    """The probe of ``--data``, with questions as long as the model's positions at most."""
    from trelm_ds.backbone import max_positions
    from trelm_ds.evaluate import read_probe

    return read_probe(args.data, tokenizer, max_positions(model.backbone.config))


def score_lama(args, model, tokenizer, device) -> dict:
    from trelm_ds.evaluate import probe_accuracy

    probe = read_facts(args, model, tokenizer)
    return probe_accuracy(model, probe, device, batch_size=args.per_device_eval_batch_size)


def score_neurons(args, model, tokenizer, device) -> dict:
    from trelm_ds.downstream.neurons import knowledge_neuron_report

    return knowledge_neuron_report(model, read_facts(args, model, tokenizer), args.max_eval_samples)


def score_heldout(args, model, tokenizer, device) -> dict:
    from trelm_ds.backbone import max_positions
    from trelm_ds.config import load_config
    from trelm_ds.data.graph import KnowledgeGraph
    from trelm_ds.data.heldout import heldout_batches
    from trelm_ds.data.shards import load_manifest
    from trelm_ds.data.tables import KnowledgeTables
    from trelm_ds.data.tokenizer import load_tokenizer
    from trelm_ds.errors import DataError
    from trelm_ds.evaluate import heldout_mlm_loss

    manifest = load_manifest(args.data)
    if load_tokenizer(args.data / "tokenizer").get_vocab() != tokenizer.get_vocab():
        raise DataError(
            f"{args.model} and {args.data} have different vocabularies: the token ids of the one "
            "mean nothing to the other"
        )
    if manifest["max_seq_length"] > (longest := max_positions(model.backbone.config)):
        raise DataError(
            f"{args.data} has sequences of up to {manifest['max_seq_length']} tokens, {args.model} "
            f"positions for {longest}"
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
