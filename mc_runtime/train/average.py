"""`mc train average`: the mean of several runs' weights, which is often better than any of them.

Runs from one start that drew other samples, or had another learning rate, end in one basin; the mean of what they
learned errs less than each (Wortsman et al. 2022, "Model soups").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mc_runtime.errors import InputError


def mean_of_files(paths: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, added in fp32 and in the dtypes of the first file, and its metadata. Raises InputError where the files
    cannot be read, or differ in the names, shapes or metadata."""
    if len(paths) < 2:
        raise InputError(f"files: expected at least 2, got {len(paths)}")
    (first, about), *others = [_read(path) for path in paths]
    sums = {name: x.float() for name, x in first.items()}
    for path, (tensors, metadata) in zip(paths[1:], others, strict=True):
        if {n: x.shape for n, x in tensors.items()} != {n: x.shape for n, x in first.items()} or metadata != about:
            raise InputError(f"files: {path} does not hold the same parts as {paths[0]}")
        for name, x in tensors.items():
            sums[name] += x.float()
    return {name: (x / len(paths)).to(first[name].dtype).contiguous() for name, x in sums.items()}, about


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def average(
    files: Annotated[list[Path], typer.Argument(help="Weights of two runs or more, of the same parts.")],
    out: Annotated[Path, typer.Option(help="Weights to write (safetensors).")],
) -> None:
    """Write the mean of several runs' weights.

    Example: mc train average a.safetensors b.safetensors c.safetensors --out gist.safetensors
    """
    tensors, metadata = mean_of_files(files)
    if not all(bool(torch.isfinite(x).all()) for x in tensors.values()):
        raise InputError("files: hold values that are not finite")
    try:
        save_file(tensors, str(out), metadata)
    except (OSError, SafetensorError) as error:
        raise InputError(f"out: {out} cannot be written ({error})") from error
    typer.echo(f"the mean of {len(files)} files: {out}", err=True)
