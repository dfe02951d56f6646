"""Attached models compute what they computed before, and what could not be exact is refused."""

from __future__ import annotations

import copy
import runpy
import sys
from typing import Any

import pytest
import torch
import transformers as hf
from hf_models import CASES, GEMMA4, SHAPE, VOCAB, attached, build, by_rank, named, random_ids, run

from mc_kernels.integrations import transformers as mc
from mc_kernels.integrations.transformers import WorkingContextCache, attach, detach
from mc_kernels.integrations.transformers import requirement as requirement_module
from mc_kernels.testing import assert_within_error_rule

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 7, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("case", CASES)
def test_logits_without_splices_are_the_models_own(case: str) -> None:
    """Read at once and in pieces, which cross the sliding window of those that have one."""
    ids, model = random_ids(2, 60), build(case)
    with torch.no_grad():
        exact, plain = build(case, torch.float64)(ids).logits, model(ids).logits
    with attached(model):
        at_once, cache = run(model, WorkingContextCache(model, 64, batch_size=2), ids), None
        cache = WorkingContextCache(model, 60, batch_size=2)
        parts = [run(model, cache, part) for part in ids.split([20, 1, 30, 1, 1, 7], dim=1)]
    assert_within_error_rule(at_once, exact, plain, what="at once")
    assert_within_error_rule(torch.cat(parts, dim=1), exact, plain, what="in pieces")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain), "detach gives the model back as it was"


@pytest.mark.parametrize("case", CASES)
def test_generate_gives_the_same_greedy_tokens(case: str) -> None:
    """Two rows, the second padded on the left; the padding takes no slot."""
    model, ids = build(case), random_ids(2, 40)
    mask = torch.ones_like(ids)
    ids[1, :9], mask[1, :9] = 0, 0
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    with attached(model):
        cache = WorkingContextCache(model, 48, batch_size=2)
        assert torch.equal(model.generate(ids, attention_mask=mask, **named(model, cache), **GREEDY), expected)
    assert cache.lengths == [46, 37]
    assert (cache.pos >= 0).sum(1).tolist() == [46, 37]


def test_generate_reads_its_prompt_in_chunks() -> None:
    model, ids = build("qwen3"), random_ids(2, 40)
    mask = torch.ones_like(ids)
    ids[1, :9], mask[1, :9] = 0, 0
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    with attached(model):
        cache = WorkingContextCache(model, 64, batch_size=2)
        got = model.generate(ids, attention_mask=mask, prefill_chunk_size=16, **named(model, cache), **GREEDY)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_second_turns_take_new_tokens_only(beams: int) -> None:
    """Ids and embeddings over a cache that is not empty, where transformers' own length arithmetic is about the whole
    text (issues 35707 and 36510 of transformers)."""
    model, first, second = build("llama"), random_ids(1, 30), random_ids(1, 9, seed=1)
    settings = GREEDY | {"num_beams": beams}
    whole = model.generate(torch.cat((first, second), 1), **settings)[:, 39:]
    with attached(model):
        for name, given in (("input_ids", second), ("inputs_embeds", model.get_input_embeddings()(second).detach())):
            cache = WorkingContextCache(model, 64)
            run(model, cache, first)
            if beams > 1:
                cache.batch_repeat_interleave(beams)
            got = model.generate(**{name: given}, **named(model, cache), **settings)
            assert torch.equal(got[:, -7:], whole), name


def test_guessed_tokens_are_cropped_again() -> None:
    """Prompt lookup runs several guesses in one forward and takes back those that were wrong."""
    model, ids = build("llama"), random_ids(1, 6).repeat(1, 5)
    expected = model.generate(ids, **GREEDY)
    with attached(model):
        cache = WorkingContextCache(model, 64)
        got = model.generate(ids, prompt_lookup_num_tokens=3, **named(model, cache), **GREEDY)
    assert torch.equal(got, expected)
    assert cache.lengths == [36]


def test_layers_of_unlike_kind_are_refused() -> None:
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight.data = attention.k_proj.weight.data[:12]
    attention.v_proj.weight.data = attention.v_proj.weight.data[:12]
    with pytest.raises(ValueError, match=r"one shape and dtype on one device, got \(Hkv, D\) = \(1, 12\)"):
        attach(model)


def test_a_layer_without_positions_is_left_unrotated() -> None:
    config = hf.SmolLM3Config(**SHAPE, no_rope_layer_interval=2)
    torch.manual_seed(0)
    model, ids = hf.SmolLM3ForCausalLM(config).eval(), random_ids(1, 30)
    with torch.no_grad():
        exact, plain = copy.deepcopy(model).double()(ids).logits, model(ids).logits
    with attached(model):
        ropes = [layer.rope for layer in mc.attachment_of(model).layers]
        got = run(model, WorkingContextCache(model, 32), ids)
    assert [rope is None for rope in ropes] == [False, True, False]
    assert_within_error_rule(got, exact, plain)


def test_layers_take_their_own_frequencies_from_the_model() -> None:
    with attached(build("gemma3")) as model:
        layers = mc.attachment_of(model).layers
    assert [layer.window for layer in layers] == [24] * 5 + [None, 24]
    local, everywhere = layers[0].rope, layers[5].rope
    assert local is not None
    assert everywhere is not None
    assert everywhere.inv_freq[-1] < local.inv_freq[-1] / 10  # theta 1e6 beside 1e4
    with attached(build("gemma4")) as model:
        layers = mc.attachment_of(model).layers
    local, everywhere = layers[0].rope, layers[5].rope
    assert local is not None
    assert everywhere is not None
    assert [layer.window for layer in layers] == [24] * 5 + [None]
    assert local.inv_freq.count_nonzero() == 8
    assert everywhere.inv_freq.count_nonzero() == 2  # a quarter is rotated
    assert everywhere.inv_freq[1] < local.inv_freq[1] / 1.5
    with attached(build("yarn")) as model:
        rope = mc.attachment_of(model).layers[0].rope
    assert rope is not None
    assert rope.attention_scaling == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)


def test_bf16_errs_no_more_than_the_model_itself() -> None:
    ids = random_ids(2, 50)
    model = build("llama", torch.bfloat16)
    with torch.no_grad():
        exact, plain = build("llama", torch.bfloat16).double()(ids).logits, model(ids).logits
    with attached(model):
        got = run(model, WorkingContextCache(model, 64, batch_size=2), ids)
    assert_within_error_rule(got, exact, plain)


def refused_models() -> dict[str, tuple[str, Any]]:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    per_layer = GEMMA4 | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
    return {
        "per-layer inputs": ("input ids", lambda: hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**per_layer))),
        "unlike heads": (
            "layers of one shape",
            lambda: hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**GEMMA4 | {"global_head_dim": 32})),
        ),
        "dynamic": (
            "change with the length",
            lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, rope_parameters=dynamic)),
        ),
        "gpt2": ("rotary", lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9))),
    }


@pytest.mark.parametrize("name", refused_models())
def test_models_that_would_not_be_exact_are_refused_and_left_as_they_were(name: str) -> None:
    reason, make = refused_models()[name]
    torch.manual_seed(0)
    model, ids = make().eval(), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
    with pytest.raises(ValueError, match=reason):
        attach(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_an_unknown_rotation_is_refused() -> None:
    """Frequencies that the model's rotary module does not name."""
    model = build("llama")
    rotary = model.model.rotary_emb
    plain = rotary.forward
    rotary.forward = lambda x, position_ids: plain(x, position_ids * 3)
    with pytest.raises(ValueError, match="no known way"):
        attach(model)


def test_calls_that_cannot_be_served_say_so_and_change_nothing() -> None:
    model, ids = build("llama"), random_ids(2, 6)
    with pytest.raises(ValueError, match="call attach"):
        WorkingContextCache(model, 16)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        attach(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with attached(model):
        cache = WorkingContextCache(model, 16, batch_size=2)
        run(model, cache, ids)
        before = [by_rank(cache, row) for row in (0, 1)]
        own = named(model, hf.DynamicCache())
        four = torch.ones(2, 1, 6, 12, dtype=torch.bool)
        with pytest.raises(ValueError, match="is attached"):
            model(ids)
        with pytest.raises(ValueError, match="is attached"):
            model(ids, **own)
        with pytest.raises(ValueError, match="attention_mask"):
            run(model, cache, ids, attention_mask=four)
        with pytest.raises(ValueError, match="2 rows, got 1"):
            run(model, cache, ids[:1])
        with pytest.raises(ValueError, match="17 entries do not fit"):
            run(model, cache, random_ids(2, 11))
        with pytest.raises(ValueError, match="no_grad"):
            model(ids, **named(model, cache))
        with pytest.raises(ValueError, match="copy of an attached"):
            attach(copy.deepcopy(model))
        alone = model.model.layers[0]
        with pytest.raises(RuntimeError, match="not its layers"):
            alone(torch.zeros(2, 6, 48), position_embeddings=(torch.ones(1, 6, 12), torch.zeros(1, 6, 12)))
        with pytest.raises(ValueError, match="shares its config"):
            attach(type(model)(model.config).eval())
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="expected attention 'megacontext'"):
            run(model, cache, ids)
        model.set_attn_implementation("megacontext")
        assert attach(model) is mc.attachment_of(model)
        assert cache.lengths == [6, 6]
        assert all(torch.equal(a, b) for row in (0, 1) for a, b in zip(by_rank(cache, row), before[row], strict=True))
    with pytest.raises(ValueError, match="attached model"):
        detach(model)


def test_a_forward_that_fails_adds_nothing() -> None:
    model, ids = build("llama"), random_ids(1, 6)
    with attached(model):
        cache = WorkingContextCache(model, 16)
        run(model, cache, ids)

        def fail(*_: Any) -> None:
            raise KeyError("in the middle")

        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            run(model, cache, ids)
        handle.remove()
        assert cache.lengths == [6]
        assert int((cache.pos >= 0).sum()) == 6
        fresh = WorkingContextCache(model, 16)
        run(model, fresh, ids)
        assert torch.equal(run(model, cache, ids), run(model, fresh, ids))


def test_a_missing_or_old_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(requirement_module.__file__)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match=r"not installed: pip install 'megacontext\[transformers\]'"):
            runpy.run_path(path)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["transformers"], "__version__", "4.57.0")
        with pytest.raises(ImportError, match=r"5\.16\.0 or newer, got 4\.57\.0"):
            runpy.run_path(path)
