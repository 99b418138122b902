#!/usr/bin/env python
"""Checkpoint to Hugging Face folder: ``python launch/export.py CHECKPOINT DIR``."""

import sys

from trelm_ds.export_cli import main

if __name__ == "__main__":
    sys.exit(main())
