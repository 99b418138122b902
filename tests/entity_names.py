"""Names of a batch's entity candidates, written out."""

import numpy as np


def entity_tokens(words, names) -> np.ndarray:
    """int64 [C, X] token ids, padded with -1, of ``Batch.entity_words`` and ``entity_names``."""
    return np.r_[-1, np.asarray(words)][np.asarray(names)]
