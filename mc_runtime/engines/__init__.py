"""What runs the base model for a memory: one interface, several engines."""

from __future__ import annotations

from mc_runtime.errors import InputError, ModelError
from mc_runtime.model import Decoder

from .base import Engine, Reading
from .editable import CacheEngine
from .native import NativeEngine

ENGINES = ("native", "transformers")


def make_engine(engine: str | CacheEngine, decoder: Decoder) -> CacheEngine:
    """An engine by name, over a decoder's weights; an engine is passed through.

    Raises InputError for an unknown name and for an engine of another model or without an editable cache, ModelError
    for a model that the engine does not run and where what the engine needs is not installed.
    """
    if isinstance(engine, CacheEngine):
        if engine.decoder is not decoder:
            raise InputError("engine: expected one over the session's own model, got one over another")
        return engine
    if engine == "native":
        return NativeEngine(decoder)
    if engine == "transformers":
        try:  # transformers is optional, and takes seconds to import
            from .transformers import TransformersEngine
        except ImportError as error:
            raise ModelError(f"engine: {error}") from error
        return TransformersEngine(decoder)
    got = type(engine).__name__ if isinstance(engine, Engine) else repr(engine)
    raise InputError(f"engine: expected one of {', '.join(ENGINES)}, or an engine with an editable cache, got {got}")


__all__ = ["ENGINES", "CacheEngine", "Engine", "NativeEngine", "Reading", "make_engine"]
