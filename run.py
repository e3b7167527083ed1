"""retract from the command line: `python run.py [--config configs/tiny.yaml] [key.sub=value ...]`."""

from __future__ import annotations

import sys

from pipeline.cli import leave, main

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
