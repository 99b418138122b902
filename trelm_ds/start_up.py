"""A data folder at the start of a run: what is checked, and tables that are made if nobody has."""

from __future__ import annotations

import logging
import platform
import time
from pathlib import Path

from trelm_ds.config import Config
from trelm_ds.data.entity_samples import EntitySamples, index_entity_samples, is_indexed
from trelm_ds.data.graph import graph_digest
from trelm_ds.data.shards import ShardReader
from trelm_ds.data.tables import tables_digest
from trelm_ds.data.tokenizer import tokenizer_digest
from trelm_ds.distributed import World, agree, gather_objects, together
from trelm_ds.errors import DataError

logger = logging.getLogger(__name__)

IMPORTANCE_AUTO_LIMIT = 200_000  # spans that are scored at start-up without being asked to


def ensure_importance(model, config: Config, data_dir: Path, manifest: dict, world, group) -> None:
    """Scores the training mentions with the initial model (Eq. 1) if nobody has yet.

    Raises:
        DataError: the corpus is too large to be scored on the way; names the command that does.
    """
    path = data_dir / "tables" / "importance.json"  # written by scoring, and only then
    # Every selection needs the scores: they rank the mentions under the cap.
    if not config.uses_mentions or gather_objects(path.exists(), group)[0]:
        return
    spans = manifest["splits"]["train"]["spans"]
    if spans > IMPORTANCE_AUTO_LIMIT:
        raise DataError(
            f"{data_dir} is not scored: score its {spans} mentions first, "
            f"python launch/prepare.py score --output {data_dir} --model MODEL_DIR",
            everywhere=True,
        )
    from trelm_ds.knowledge.importance import score_importance

    logger.info("scoring %d mentions with the initial model (Eq. 1), once", spans)
    # A run that began at the same time may be done first, and trains by its scores already.
    score_importance(model, data_dir, world=world, group=group, keep=True)


def check_knowledge(data_dir: Path, manifest: dict, world, group) -> str:
    """sha256 of the tables, which a resumed run has to find as they were.

    Graph and tokenizer are the manifest's, and the tables the same on every machine: one rank of
    each looks, because its folder may be a copy on its disk.

    Raises:
        DataError: on every rank, where any machine's files are others.
    """

    def look() -> str | None:
        if world.local_rank != 0:
            return None
        for name, found in (
            ("graph", graph_digest(data_dir)),
            ("tokenizer", tokenizer_digest(data_dir)),
        ):
            if manifest[name]["sha256"] != found:
                raise DataError(
                    f"{data_dir}/{name}: not the manifest's (sha256): corrupt or changed"
                )
        return tables_digest(data_dir)

    digests = {digest for digest in together(look, group) if digest is not None}
    if len(digests) > 1:
        problem = f"{data_dir}/tables: not the same on every machine: copy one to all"
        raise DataError(problem, everywhere=True)
    return digests.pop()


CHECK_ROUND_S = 60.0  # far below any time that a collective waits


def check_shards(reader: ShardReader, world: World, group) -> None:
    """Checks the sha256 of every shard, once on each machine: its folder may be a copy on its disk.

    A machine's ranks deal the shards out among themselves, in rounds: a corpus of 100 million
    sentences takes a slow disk longer than a collective waits. Collective.

    Raises:
        DataError: on every rank, naming the first file that is missing or damaged.
    """
    host = platform.node()
    ranks = gather_objects((host, world.local_rank), group)
    local = sorted({rank for where, rank in ranks if where == host})
    shards = reader.checked_shards(local.index(world.local_rank), len(local))

    def check_some() -> bool:
        """Whether all of this rank's are checked."""
        until = time.monotonic() + CHECK_ROUND_S
        return all(time.monotonic() < until for _ in shards)

    while not all(together(check_some, group)):
        pass
    reader.close()


INDEX_AUTO_LIMIT = 2_000_000  # samples that are indexed at start-up without being asked to


def ensure_entity_samples(
    config: Config, data_dir: Path, manifest: dict, world, group
) -> EntitySamples | None:
    """The samples of each entity, if the sampling needs them; indexed if nobody has yet.

    Raises:
        DataError: the corpus is too large to be indexed on the way; names the command that does.
    """
    if config.sampling.form == "natural":
        return None
    samples = manifest["splits"]["train"]["samples"]
    with agree(group):
        # One rank per machine, because the folder may be a copy on its disk.
        if world.local_rank == 0 and not is_indexed(data_dir, manifest):
            if samples > INDEX_AUTO_LIMIT:
                raise DataError(
                    f"{data_dir}: index its {samples} samples by entity first, "
                    f"python launch/prepare.py index --output {data_dir}"
                )
            logger.info("indexing %d samples by entity, once", samples)
            index_entity_samples(data_dir)
    return EntitySamples.load(data_dir)
