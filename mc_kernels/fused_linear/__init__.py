"""A linear map of a few rows with its norm, activation and residual, in one read of the weight."""

from .op import fused_linear

__all__ = ["fused_linear"]
