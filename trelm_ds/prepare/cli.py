"""The command line of ``launch/prepare.py``: corpora in, prepared folders out, steps on them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from trelm_ds.arguments import LineParser
from trelm_ds.data.shards import load_manifest
from trelm_ds.distributed import has_peers, report_once
from trelm_ds.errors import EXIT_DONE, ConfigError, TrelmError
from trelm_ds.prepare.builder import BuildOptions, build
from trelm_ds.prepare.ernie import read_ernie
from trelm_ds.prepare.graphs import read_graph
from trelm_ds.prepare.jsonl import read_jsonl
from trelm_ds.prepare.mixing import mix
from trelm_ds.prepare.raw import RawCorpus
from trelm_ds.prepare.reader import ReaderOptions
from trelm_ds.prepare.rebel import read_rebel
from trelm_ds.prepare.staging import check_output
from trelm_ds.prepare.trex import read_trex
from trelm_ds.prepare.wikidata5m import read_wikidata5m
from trelm_ds.prepare.wikipedia import read_wikipedia

log = logging.getLogger(__name__)


def _read_sample(inputs: list[Path], options: ReaderOptions) -> RawCorpus:
    defaults = ReaderOptions()
    for flag, is_given in (
        ("input", bool(inputs)),
        ("limit", options.limit != defaults.limit),
        ("heldout_fraction", options.heldout_fraction != defaults.heldout_fraction),
    ):
        if is_given:
            raise ConfigError(f"sample: takes no --{flag}, the corpus is made by the package")
    from trelm_ds.sample.corpus import sample_corpus

    return sample_corpus(options.seed)


READERS: dict[str, tuple[Callable[[list[Path], ReaderOptions], RawCorpus], str]] = {
    "sample": (_read_sample, "the embedded synthetic corpus; no --input"),
    "trex": (read_trex, "LAMA's T-REx: a folder with trex/P*.jsonl and relations.jsonl"),
    "ernie": (read_ernie, "ERNIE's linked Wikipedia articles"),
    "rebel": (read_rebel, "REBEL documents, *.jsonl"),
    "jsonl": (read_jsonl, 'your own: {"id", "text", "spans": [[start, end, "Q42"]]} a line'),
    "wikipedia": (read_wikipedia, "WikiExtractor's output with links, and a table of titles"),
    "wikidata5m": (read_wikidata5m, "Wikidata5M: triples, aliases and texts in one folder"),
}


def _build_parser() -> argparse.ArgumentParser:
    parser = LineParser(
        prog="launch/prepare.py",
        description="Write a prepared data folder from a corpus, or run a step on such a folder.",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    defaults, build_defaults = ReaderOptions(), BuildOptions()
    for name, (_, text) in READERS.items():
        kind = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
        # What a kind has no use for is not shown, and refused with a line of its own.
        holds_back, is_made = name == "trex", name == "sample"
        kind.add_argument(
            "--input",
            nargs="+",
            type=Path,
            default=[],
            metavar="PATH",
            help=argparse.SUPPRESS if is_made else "files or folders of the corpus",
        )
        kind.add_argument(
            "--output", required=True, type=Path, metavar="DIR", help="prepared folder to write"
        )
        kind.add_argument(
            "--also",
            nargs="+",
            action="extend",
            default=[],
            metavar="KIND=PATH",
            help="other corpora into the same folder; what T-REx holds back is left out of their "
            "texts"
            if holds_back
            else argparse.SUPPRESS,
        )
        kind.add_argument(
            "--text_only_fraction",
            type=float,
            metavar="X",
            help="share of the other subjects whose facts the graph does not have, so that only "
            f"texts teach them; default {defaults.text_only_fraction:g}"
            if holds_back
            else argparse.SUPPRESS,
        )
        kind.add_argument(
            "--graph",
            action="append",
            default=[],
            metavar="PATH[:FORMAT]",
            help="a graph to merge; repeatable; FORMAT: fb15k237, codex, wikidata5m, tsv",
        )
        kind.add_argument(
            "--vocab",
            type=Path,
            metavar="PATH",
            help="BERT vocab.txt, RoBERTa vocab.json beside merges.txt, or a tokenizer folder; "
            "else a WordPiece vocabulary is trained on the corpus",
        )
        kind.add_argument(
            "--vocab_min_count",
            type=int,
            default=build_defaults.vocab_min_count,
            metavar="N",
            help="leave out pieces of a BERT --vocab that the texts use less than N times: for "
            "small models, whose output layer is most of a step; default 0, none",
        )
        kind.add_argument(
            "--max_seq_length",
            type=int,
            default=build_defaults.max_seq_length,
            metavar="N",
            help="tokens of a sample at most, longer texts are cut into several; "
            f"default {build_defaults.max_seq_length}",
        )
        _add_seed(kind)
        kind.add_argument(
            "--heldout_fraction",
            type=float,
            default=defaults.heldout_fraction,
            metavar="X",
            help=argparse.SUPPRESS
            if is_made
            else "share of documents that are held out, where the corpus does not say which; "
            f"default {defaults.heldout_fraction}",
        )
        kind.add_argument(
            "--graph_only_fraction",
            type=float,
            metavar="X",
            help="share of subjects whose facts no text states; "
            f"default {defaults.graph_only_fraction}"
            if holds_back
            else argparse.SUPPRESS,
        )
        kind.add_argument(
            "--limit",
            type=int,
            metavar="N",
            help=argparse.SUPPRESS
            if is_made
            else "documents (trex: facts) of each corpus to read at most; default all",
        )
        kind.add_argument(
            "--strict", action="store_true", help="a mentioned id that no graph knows is an error"
        )
        kind.add_argument(
            "--overwrite", action="store_true", help="replace an existing prepared folder"
        )
        _add_transe(kind)
    for name, text in (
        ("score", "semantic importance of every training mention (Eq. 1)"),
        ("index", "samples of each entity, for sampling.form static and knowledge_state"),
        ("embed", "train the TransE vectors again"),
        ("stats", "write stats.json and stats.png again"),
        ("verify", "check every checksum, sample and id"),
    ):
        step = kinds.add_parser(name, help=f"step: {text}", description=text, allow_abbrev=False)
        step.add_argument(
            "--output", required=True, type=Path, metavar="DIR", help="the prepared folder"
        )
        if name == "embed":
            _add_transe(step)
            _add_seed(step)
        if name == "score":
            source = step.add_mutually_exclusive_group(required=True)
            source.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face folder")
            source.add_argument(
                "--random_init", action="store_true", help="a model from scratch, default sizes"
            )
            _add_seed(step)
            step.add_argument(
                "--replacement",
                choices=("unk", "mask"),
                default="unk",
                help="what a mention's tokens become; default unk",
            )
            step.add_argument(
                "--batch_tokens",
                type=int,
                default=4096,
                metavar="N",
                help="most tokens of one forward; more suits a GPU; default 4096",
            )
            step.add_argument(
                "--bf16", action="store_true", help="faster on GPUs, coarser scores (docs/data.md)"
            )
    return parser


def _add_seed(parser: argparse.ArgumentParser) -> None:
    seed = ReaderOptions().seed
    parser.add_argument(
        "--seed", type=int, default=seed, metavar="N", help=f"of random choices; default {seed}"
    )


def _add_transe(parser: argparse.ArgumentParser) -> None:
    defaults = BuildOptions()
    for name, text in (
        ("dim", "length of a TransE vector"),
        ("epochs", "TransE's passes over the triples"),
    ):
        default = getattr(defaults, name)
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default {default}"
        )


def prepare(argv: list[str]) -> str | None:
    """Runs one command.

    Returns:
        One line about what was done; None on ranks above 0.

    Raises:
        TrelmError: anything the user can mend; nothing half-written is left.
    """
    args = _build_parser().parse_args(argv)
    if args.kind in READERS:
        return _prepare_corpus(args)
    steps = {"score": _score, "index": _index, "embed": _embed, "stats": _stats, "verify": _verify}
    return steps[args.kind](args)


def _prepare_corpus(args: argparse.Namespace) -> str:
    options = BuildOptions(
        max_seq_length=args.max_seq_length,
        strict=args.strict,
        overwrite=args.overwrite,
        dim=args.dim,
        epochs=args.epochs,
        vocab_min_count=args.vocab_min_count,
    )
    if args.vocab_min_count and args.vocab is None:
        raise ConfigError("--vocab_min_count: name the vocabulary with --vocab")
    if not args.input and args.kind != "sample":
        raise ConfigError(f"{args.kind}: --input is needed")
    held_back = {}
    for name, where in (("graph_only_fraction", "its texts"), ("text_only_fraction", "its graph")):
        if getattr(args, name) is not None:
            if args.kind != "trex":
                raise ConfigError(f"--{name}: trex alone holds facts back from {where}")
            held_back[name] = getattr(args, name)
    if args.also and args.kind != "trex":
        raise ConfigError("--also: trex alone takes other corpora beside it")
    check_output(args.output, args.overwrite)  # before minutes of reading
    reading = ReaderOptions(
        seed=args.seed,
        heldout_fraction=args.heldout_fraction,
        **held_back,
        limit=args.limit,
        vocab=args.vocab,
    )
    for source in args.graph:
        reading.graph.merge(read_graph(source))
    sources = [(args.kind, args.input), *_also(args)]
    corpus = mix([READERS[kind][0](paths, reading) for kind, paths in sources])
    manifest = build(corpus, args.output, reading, options)
    splits, graph = manifest["splits"], manifest["graph"]
    return (
        f"{args.output}: {splits['train']['samples']} training and "
        f"{splits['heldout']['samples']} held-out samples, {splits['train']['tokens']} tokens, "
        f"{graph['entities']} entities, {graph['relations']} relations, {graph['triples']} triples"
    )


def _also(args: argparse.Namespace) -> list[tuple[str, list[Path]]]:
    """Kind and inputs of each corpus of ``--also``; several paths of a kind are one corpus."""
    found: dict[str, list[Path]] = {}
    for text in args.also:
        kind, _, path = text.partition("=")
        if kind not in READERS or kind == "sample" or not path:
            kinds = ", ".join(name for name in READERS if name != "sample")
            raise ConfigError(f"--also {text}: expected KIND=PATH, kinds are {kinds}")
        if kind == args.kind:
            raise ConfigError(f"--also {text}: name it with --input, beside the other {kind}")
        found.setdefault(kind, []).append(Path(path))
    return list(found.items())


def _score(args: argparse.Namespace) -> str | None:
    """By this process alone, or by the ranks that ``torchrun`` or ``srun`` has started."""
    import torch

    from trelm_ds.backbone import MaskedLanguageModel, load_backbone
    from trelm_ds.config import build_config
    from trelm_ds.data.tokenizer import load_tokenizer
    from trelm_ds.distributed import cpu_group, get_world, leave
    from trelm_ds.engine import init_distributed, local_device
    from trelm_ds.knowledge.importance import score_importance

    ReaderOptions(seed=args.seed)  # checks it
    if args.batch_tokens < 1:
        raise ConfigError(f"--batch_tokens {args.batch_tokens}: must be at least 1")
    world = get_world(dict(os.environ))
    if world.size > 1:
        get_world()  # completes the variables themselves, which the rendezvous reads
    device = local_device(world)
    manifest = load_manifest(args.output)
    tokenizer = load_tokenizer(args.output / "tokenizer")
    length = manifest["max_seq_length"]
    if args.random_init:
        model_keys = {
            "model.model_type": manifest["tokenizer"]["type"],
            "model.max_position_embeddings": max(512, length),
        }
    else:
        model_keys = {"model.model_name_or_path": str(args.model)}
    config = build_config(model_keys | {"data.max_seq_length": length})
    torch.manual_seed(args.seed)
    model = MaskedLanguageModel(
        load_backbone(config, tokenizer.get_vocab(), tokenizer.pad_token_id)
    )
    model.to(device)
    if world.size > 1:
        init_distributed(world, device)
    report = score_importance(
        model,
        args.output,
        replacement=args.replacement,
        batch_tokens=args.batch_tokens,
        bf16=args.bf16,
        world=world,
        group=cpu_group(),
        resumable=True,
    )
    leave()
    if report is None:
        return None
    return f"{args.output}: scored {report['spans']} spans, mean importance {report['mean']:.4f}"


def _index(args: argparse.Namespace) -> str:
    from trelm_ds.data.entity_samples import index_entity_samples

    pairs = index_entity_samples(args.output)
    return f"{args.output}: indexed {pairs} pairs of entity and training sample"


def _embed(args: argparse.Namespace) -> str:
    from trelm_ds.data.graph import KnowledgeGraph
    from trelm_ds.data.tables import save_tables
    from trelm_ds.knowledge.transe import train_transe

    BuildOptions(dim=args.dim, epochs=args.epochs)  # checks both
    ReaderOptions(seed=args.seed)  # checks it
    load_manifest(args.output)
    graph = KnowledgeGraph.load(args.output)
    entities, relations = train_transe(
        graph.triples,
        graph.num_entities,
        graph.num_relations,
        dim=args.dim,
        epochs=args.epochs,
        seed=args.seed,
    )
    save_tables(args.output, entity_embeddings=entities, relation_embeddings=relations)
    return f"{args.output}: TransE vectors of {graph.num_entities} entities, dim {args.dim}"


def _stats(args: argparse.Namespace) -> str:
    from trelm_ds.prepare.stats import write_stats

    stats = write_stats(args.output, load_manifest(args.output))
    return f"{args.output}: stats of {stats['samples']['train']} training samples"


def _verify(args: argparse.Namespace) -> str:
    from trelm_ds.prepare.verify import verify

    return verify(args.output)


def main(argv: list[str] | None = None) -> int:
    """The script: progress and errors on stderr, the summary on stdout.

    Returns:
        The exit code.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        line = prepare(sys.argv[1:] if argv is None else argv)
    except (TrelmError, OSError) as error:
        code = report_once(error)
        if has_peers():
            sys.stderr.flush()
            os._exit(code)  # do not wait in the process group's destructor for ranks that still run
        return code
    if line is not None:
        sys.stdout.write(line + "\n")
    return EXIT_DONE
