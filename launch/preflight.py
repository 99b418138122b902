#!/usr/bin/env python
"""Check the nodes of a job before it trains; ``launch/slurm/pretrain.sbatch`` calls it."""

import sys

from trelm_ds.preflight import main

if __name__ == "__main__":
    sys.exit(main())
