"""A linear map with its norm, activation and residual, in one read of the weight."""

from .op import fused_linear

__all__ = ["fused_linear"]
