"""In-place edits of a KV cache: remove, insert, move and re-rotate entries, contiguous or paged."""

from .op import kv_splice_
from .plan import Edit, PageTable, SplicePlan

__all__ = ["Edit", "PageTable", "SplicePlan", "kv_splice_"]
