"""What `import mc_kernels` loads, and what its names mean whatever was imported before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mc_kernels

ROOT = Path(__file__).resolve().parents[2]
NAMES_BY_MODULE = ("context_attention", "fused_linear", "gist_encode", "gist_pool", "lens_score")


def python(code: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_torch_comes_with_the_first_op() -> None:
    python(
        "import sys, mc_kernels, mc_kernels.extension\n"
        "assert 'torch' not in sys.modules\n"
        "assert not hasattr(mc_kernels, 'nothing') and 'torch' not in sys.modules\n"
        "mc_kernels.kv_splice_\n"
        "import torch\n"
        "assert torch.ops.mc.lens_score\n"
    )


def test_where_torch_is_loaded_the_ops_are_registered() -> None:
    python("import torch, mc_kernels\nassert torch.ops.mc.kv_splice_.default")


def test_a_folder_does_not_take_the_name_of_its_op() -> None:
    """Each op's folder is imported before the package's own names are used, and again after."""
    lines = [f"import mc_kernels.{name}.cases" for name in NAMES_BY_MODULE]
    lines += ["import mc_kernels, types"]
    lines += [f"assert callable(mc_kernels.{name}), {name!r}" for name in NAMES_BY_MODULE]
    lines += [
        f"from mc_kernels import {name}; assert isinstance({name}, types.FunctionType)" for name in NAMES_BY_MODULE
    ]
    lines += ["from mc_kernels.gist_pool.ref import RMS_EPS"]
    python("\n".join(lines))


def test_all_names_are_there() -> None:
    for name in mc_kernels.__all__:
        assert callable(getattr(mc_kernels, name)), name
    assert set(mc_kernels.__all__) <= set(dir(mc_kernels))
    assert mc_kernels.native.available
    with pytest.raises(AttributeError, match="module 'mc_kernels' has no attribute 'kv_splice_plan'"):
        mc_kernels.kv_splice_plan  # noqa: B018
