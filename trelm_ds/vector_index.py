"""FAISS, for all that looks for near vectors: the entity linker and the hard negatives."""

from __future__ import annotations

import math

import numpy as np

from trelm_ds.errors import ConfigError

TRAINING_VECTORS = 64  # a list: they place the centroids well enough


def inner_product_index(
    vectors: np.ndarray, *, flat_limit: int, probes: int, seed: int, needed_for: str
):
    """A FAISS index of ``vectors`` by inner product.

    Args:
        vectors: float32 [n, dim].
        flat_limit: fewer vectors are searched exhaustively; more go through about 4 sqrt(n)
            inverted lists of 8-bit codes.
        probes: lists that a search looks into.
        seed: of the vectors that the lists are trained on.
        needed_for: what the message begins with where FAISS is not installed.
    Raises:
        ConfigError: FAISS is not installed.
    """
    try:
        # Only here: everything else works without it.
        import faiss
    except ImportError:
        raise ConfigError(f"{needed_for} needs FAISS: pip install faiss-cpu") from None
    total, dim = vectors.shape
    if total < flat_limit:
        index = faiss.IndexFlatIP(dim)
    else:
        lists = 2 ** round(math.log2(4 * math.sqrt(total)))
        index = faiss.index_factory(dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.nprobe = probes
        sample = np.random.Generator(np.random.Philox(key=seed)).permutation(total)
        index.train(vectors[np.sort(sample[: TRAINING_VECTORS * lists])])
    index.add(vectors)
    return index
