#!/usr/bin/env python
"""Pre-train: ``deepspeed launch/pretrain.py --deepspeed ds_configs/zero2.json``."""

import sys

from trelm_ds.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
