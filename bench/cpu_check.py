"""`python bench/cpu_check.py`: see `bench/cpu/check.py` and bench/README.md."""

import sys
from pathlib import Path

# As a script, this folder comes first on the path, and its modules would hide others of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.cpu.check import app  # noqa: E402

if __name__ == "__main__":
    app()
