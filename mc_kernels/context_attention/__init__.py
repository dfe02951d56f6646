"""Attention over cache slots with RoPE on read."""

from .op import context_attention

__all__ = ["context_attention"]
