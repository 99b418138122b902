#!/usr/bin/env python
"""Benchmark: ``python launch/benchmark.py KIND --json FILE``."""

import sys

from trelm_ds.benchmark.cli import main

if __name__ == "__main__":
    sys.exit(main())
