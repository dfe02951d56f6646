"""Refuses a missing or old transformers, before anything of it is used."""

from __future__ import annotations

MINIMUM = "5.16.0"
_WHO = f"mc_kernels.integrations.transformers needs transformers {MINIMUM} or newer"

try:
    import transformers
    from packaging.version import Version
except ImportError as error:
    raise ImportError(f"{_WHO}, which is not installed: pip install 'megacontext[transformers]'") from error

if Version(transformers.__version__) < Version(MINIMUM):
    raise ImportError(f"{_WHO}, got {transformers.__version__}: pip install -U 'megacontext[transformers]'")
