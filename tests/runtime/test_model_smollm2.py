"""The default model, read from its GGUF file, against transformers' reading of the same file."""

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from mc_runtime.model import ConcatStore, LoadedModel, load_model
from mc_runtime.model.resolve import PACKAGED, _packaged_file

TEXT = inspect.getsource(textwrap)[:1200]
GGUF = PACKAGED["smollm2-135m"].file


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def folder() -> Path:
    return _packaged_file("smollm2-135m").parent


@pytest.fixture(scope="module")
def peer(folder: Path) -> Iterator[PreTrainedModel]:
    logging.disable_progress_bar()
    yield AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    logging.enable_progress_bar()


@pytest.mark.slow
@torch.no_grad()
def test_logits_and_greedy_text_equal_transformers(model: LoadedModel, peer: PreTrainedModel) -> None:
    ids = torch.tensor([model.tokenizer.encode(TEXT)])
    length = ids.shape[1]
    assert length > 300
    store, decoder = ConcatStore(), model.decoder
    hidden = decoder(decoder.embed(ids), torch.arange(length)[None], store).hidden
    assert (decoder.logits(hidden) - peer(ids).logits).abs().max() < 1e-3

    expected = peer.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0)[0, length:]
    token, ours = decoder.logits(hidden[:, -1:]).argmax(-1), []
    for step in range(64):
        ours.append(int(token))
        hidden = decoder(decoder.embed(token), torch.tensor([[length + step]]), store).hidden
        token = decoder.logits(hidden).argmax(-1)
    assert ours == expected.tolist()


@pytest.mark.slow
def test_tokens_equal_transformers(model: LoadedModel, folder: Path) -> None:
    """transformers' reading of the file leaves out the cutting before each digit, which shows wherever a number
    follows white space that could merge with more white space, or a numeral beyond ASCII follows a space."""
    peer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    words = re.sub(r"\d", "", TEXT)
    for text in (words, "pi is 3.14159", "x=10**6", "a1b22", "don't I'LL", "naïve 日本語 🙂✓", "a\r\n b", ""):
        assert model.tokenizer.encode(text) == peer(text, add_special_tokens=False).input_ids
    for text in ("a ½", "list:\n\n  1. one"):
        assert model.tokenizer.encode(text) != peer(text, add_special_tokens=False).input_ids
    before, after = model.tokenizer.encode("list:\n\n  "), model.tokenizer.encode("1. one")
    assert model.tokenizer.encode("list:\n\n  1. one") == before + after


def test_it_is_the_default_and_knows_its_shape(model: LoadedModel) -> None:
    config = model.config
    assert (config.n_layers, config.embed_dim, config.n_heads, config.n_kv_heads, config.head_dim) == (
        30,
        576,
        9,
        3,
        64,
    )
    assert (config.max_positions, config.rope.theta, config.norm_eps, config.tied_embeddings) == (8192, 1e5, 1e-5, True)
    assert len(model.fingerprint) == 16
    assert model.decoder.head is model.decoder.embedding


@torch.no_grad()
def test_bf16_agrees_on_what_comes_next(model: LoadedModel) -> None:
    half = load_model(dtype=torch.bfloat16, device="cpu")
    assert half.fingerprint == model.fingerprint
    prompt = [*model.chat.system_ids(), *model.chat.user_turn_ids("What is the capital of France?")]
    ids = torch.tensor([prompt + model.tokenizer.encode("The capital of France is")])
    positions = torch.arange(ids.shape[1])[None]
    for loaded in (model, half):
        decoder = loaded.decoder
        hidden = decoder(decoder.embed(ids), positions).hidden[:, -1]
        assert loaded.tokenizer.decode([int(decoder.logits(hidden).argmax())]) == " Paris"
