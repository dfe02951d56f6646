"""Trained weights that ship with the package, by the model that they belong to."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SHIPPED, UNTRAINED = "shipped", "untrained"
# Of `LoadedModel.fingerprint`: the gists' file and LensNet's. Blocks of 32 tokens.
FILES: dict[str, tuple[str, str | None]] = {
    "7b17bd75d3bd4bb0": ("smollm2-135m-gist.safetensors", "smollm2-135m-lens.safetensors"),
}
BLOCK_SIZE = 32


def gistnet_file(choice: Path | str | None, fingerprint: str, block_size: int) -> Path | None:
    """The file that a choice of GistNet means; None: untrained gists.

    choice: a path; `shipped`: the package's weights for the model, or untrained gists where it has none for it or for
    blocks of that size; `untrained` or None.
    """
    if choice is None or str(choice) == UNTRAINED:
        return None
    if str(choice) != SHIPPED:
        return Path(choice)
    files = FILES.get(fingerprint)
    return CHECKPOINTS / files[0] if files is not None and block_size == BLOCK_SIZE else None


def lensnet_file(choice: Path | str | None, fingerprint: str) -> Path:
    """The file of LensNet's weights: the one that is given, or the package's for the model. Raises InputError if there
    is none."""
    if choice is not None:
        return Path(choice)
    files = FILES.get(fingerprint)
    if files is None or files[1] is None:
        raise InputError("lensnet: the package has no weights for this model; give lensnet=path of a safetensors file")
    return CHECKPOINTS / files[1]
