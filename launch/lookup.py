#!/usr/bin/env python
"""Look into a prepared folder: ``python launch/lookup.py TEXT --data DIR``."""

import sys

from trelm_ds.prepare.lookup import main

if __name__ == "__main__":
    sys.exit(main())
