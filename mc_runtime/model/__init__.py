"""The frozen base model: reading it, its tokenizer and chat format, and running it over a store of keys and values."""

from mc_runtime.model.chat import ChatTemplate
from mc_runtime.model.config import ModelConfig, RopeConfig
from mc_runtime.model.decoder import Decoder, DecoderOutput
from mc_runtime.model.load import LoadedModel, best_dtype, load_model
from mc_runtime.model.resolve import DEFAULT_MODEL, cache_dir, resolve_model
from mc_runtime.model.stores import ConcatStore, KVStore
from mc_runtime.model.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "DEFAULT_MODEL",
    "ChatTemplate",
    "ConcatStore",
    "Decoder",
    "DecoderOutput",
    "KVStore",
    "LoadedModel",
    "ModelConfig",
    "RopeConfig",
    "StreamDecoder",
    "Tokenizer",
    "best_dtype",
    "cache_dir",
    "load_model",
    "resolve_model",
]
