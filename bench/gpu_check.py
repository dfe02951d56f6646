"""`python bench/gpu_check.py`: see `bench/gpu/check.py` and bench/README.md."""

import sys
from pathlib import Path

# As a script, this folder comes first on the path, and its modules would hide others of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.gpu.check import app  # noqa: E402

if __name__ == "__main__":
    app()
