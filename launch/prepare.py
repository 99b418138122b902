#!/usr/bin/env python
"""Prepare data: ``python launch/prepare.py KIND --input PATH --output DIR``."""

import sys

from trelm_ds.prepare.cli import main

if __name__ == "__main__":
    sys.exit(main())
