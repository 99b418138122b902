"""One tiny prepared folder for all data tests, and configurations over it."""

import pytest
from tiny_corpus import TinyCorpus, write_tiny_corpus

from trelm_ds.config import Config, build_config
from trelm_ds.data.graph import KnowledgeGraph
from trelm_ds.data.tables import KnowledgeTables


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> TinyCorpus:
    return write_tiny_corpus(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def graph(corpus) -> KnowledgeGraph:
    return KnowledgeGraph.load(corpus.folder)


@pytest.fixture(scope="session")
def tables(corpus) -> KnowledgeTables:
    return KnowledgeTables.load(corpus.folder)


@pytest.fixture(scope="session")
def configure():
    """``configure(section__key=value)``: a Config without loader processes."""

    def make(**overrides) -> Config:
        flat = {key.replace("__", "."): value for key, value in overrides.items()}
        return build_config({"data.num_workers": 0, "train.per_device_train_batch_size": 4}, flat)

    return make
