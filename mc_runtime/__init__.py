"""A frozen language model with a memory that outgrows its window: `Session`."""

from .config import MemoryConfig
from .errors import MegaContextError
from .sampling import SamplingParams
from .session import Session

__all__ = ["MegaContextError", "MemoryConfig", "SamplingParams", "Session"]
