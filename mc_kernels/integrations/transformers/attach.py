"""`attach`: make a model of transformers run over a cache of unrotated keys with explicit positions."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...checks import describe
from .attention import LAYERS, NAME, AttentionLayer, Running
from .positioned import PositionedCache
from .probe import ProbedLayer, hook_identity, probe, rotary_modules

_ATTACHED: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()


class Attachment:
    """What `attach` did to a model, and what it learnt.

    layers: how each attention layer rotates and what it sees. cache_argument: what the model calls its cache.
    The model's attention implementation is `megacontext`, its rotary modules give no rotation, and a forward of its
    decoder takes its padding from the attention mask and its positions from the cache.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Use `attach`."""
        decoder = model.get_decoder()
        self.running = Running()
        self._model, self._before = ref(model), model.config._attn_implementation
        model.set_attn_implementation(NAME)
        try:
            if decoder.config._attn_implementation != NAME:
                raise ValueError(f"model: {type(model).__name__} does not take another attention implementation")
            self.layers: list[ProbedLayer] = probe(model, decoder)
        except BaseException:
            model.set_attn_implementation(self._before)
            raise
        for layer in self.layers:
            LAYERS[layer.module] = AttentionLayer(layer.rope, layer.window, self.running)
        self._names = list(inspect.signature(decoder.forward).parameters)
        # `cache` from transformers 5.24 on.
        self.cache_argument = "cache" if "cache" in self._names else "past_key_values"
        self._handles = hook_identity(rotary_modules(decoder))
        self._handles.append(decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._end, with_kwargs=True, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            LAYERS.pop(layer.module, None)
        model = self._model()
        if model is not None:
            model.set_attn_implementation(self._before)

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        config: Any = module.config
        if config._attn_implementation != NAME:
            raise ValueError(
                f"model: expected attention {NAME!r} while {type(module).__name__} is attached, got "
                f"{config._attn_implementation!r}, set since, here or through a config that another model shares"
            )
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if not isinstance(cache, PositionedCache):
            raise ValueError(
                f"cache: expected a WorkingContextCache, because {type(module).__name__} is attached, got "
                f"{type(cache).__name__}; pass cache=..., or detach(model)"
            )
        ids, rows = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given = rows if rows is not None else ids
        if given is None:
            raise ValueError("input_ids: expected input_ids or inputs_embeds, got neither")
        batch, length = given.shape[:2]
        cache.begin(batch, length, _padding(kwargs.get("attention_mask"), batch, length))
        self.running.cache = cache
        kwargs["attention_mask"] = None
        kwargs["position_ids"] = cache.q_pos.clamp(min=0)
        return (), kwargs

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        cache, self.running.cache = self.running.cache, None
        if cache is not None:
            cache.end(failed=output is None)


def _padding(mask: Any, batch: int, length: int) -> Tensor | None:
    """[B, T] which of the new entries are real, from the newest columns of a mask over the ids; None: all."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(
            f"attention_mask: expected [B={batch}, at least T={length}] over the new tokens, got {describe(mask)}; a "
            "Working Context has its visibility from positions"
        )
    keep = mask[:, mask.shape[1] - length :].bool()
    return None if bool(keep.all()) else keep


def attach(model: PreTrainedModel) -> Attachment:
    """Make a decoder of transformers run over a `WorkingContextCache`, in place; attaching twice is fine.

    Works for decoders with rotary positions that attend through transformers' AttentionInterface: Llama, Mistral,
    Qwen2, Qwen3, Gemma, Gemma 2 (softcapped logits), Gemma 3 (frequencies by layer, sliding windows, QK norm), Gemma 4
    with heads of one width (partial rotary in some layers), GLM and Phi (partial rotary, interleaved pairs), gpt-oss
    (sinks), and others. Two forwards over six
    vectors find out how each layer rotates, from the model's own rotary modules, so scaled frequencies (linear, llama3,
    YaRN) and its magnitude are the model's.

    Until `detach`, every forward needs a `PositionedCache`, positions come from it (`position_ids` are replaced), and
    `torch.compile` is not supported. Models must not share a config object: it names the attention of all of them.

    Raises TypeError for what is no PreTrainedModel; ValueError, leaving the model as it was, where the Working Context
    would not be exact: chunked or bidirectional attention, layers of unlike shape (Gemma 4 as published) or that read
    the input ids too (Gemma 3n), frequencies that change with the length of the text, an encoder.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a PreTrainedModel of transformers, got {type(model).__name__}")
    if model in _ATTACHED:
        return _ATTACHED[model]
    if model.config._attn_implementation == NAME:
        raise ValueError(
            f"model: {type(model).__name__} is a copy of an attached model, or shares its config with one; copy "
            "first, then attach"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"model: expected a decoder, got {type(model).__name__}, which has an encoder")
    if model.training and any(isinstance(m, nn.Dropout) and m.p for m in model.modules()):
        raise ValueError("model: expected model.eval(), got a model in training with dropout")
    with torch.no_grad():
        _ATTACHED[model] = attachment = Attachment(model)
    return attachment


def attachment_of(model: nn.Module) -> Attachment:
    """Raises ValueError for a model that is not attached."""
    if model not in _ATTACHED:
        raise ValueError(f"model: expected an attached model, got {type(model).__name__}; call attach(model) first")
    return _ATTACHED[model]


def detach(model: nn.Module) -> None:
    """Undo `attach`: the model runs as before, with transformers' own caches. Raises ValueError if not attached."""
    attachment_of(model).remove()
    del _ATTACHED[model]
