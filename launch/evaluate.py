#!/usr/bin/env python
"""Score a Hugging Face folder: ``python launch/evaluate.py TASK --model DIR --data DIR``."""

import sys

from trelm_ds.evaluate_cli import main

if __name__ == "__main__":
    sys.exit(main())
