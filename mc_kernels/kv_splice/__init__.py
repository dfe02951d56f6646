"""In-place edits of a KV cache: remove, insert, move and re-rotate entries, contiguous or paged."""

from ..splicing import Edit
from .op import kv_splice_
from .plan import PageTable, SplicePlan

__all__ = ["Edit", "PageTable", "SplicePlan", "kv_splice_"]
