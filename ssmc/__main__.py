"""`python -m ssmc`, for what starts modules: torchrun, debuggers, profilers."""

from __future__ import annotations

import sys

from ssmc.cli import main

if __name__ == "__main__":
    sys.exit(main())
