"""A memory on a GPU holds, shows and says what it does on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import check_session, words
from tiny import tiny_model

from mc_runtime import Session
from mc_runtime.lensnet import LensNet
from mc_runtime.model import LoadedModel

Memory = Callable[..., Session]


@pytest.fixture
def on_gpu() -> LoadedModel:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return tiny_model(device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["pooled", "projected", "embedding"])
@pytest.mark.parametrize(
    ("policy", "refresh"), [("lensnet+retrieval", "top"), ("retrieval", "tail"), ("blend", "full")]
)
def test_a_memory_on_a_gpu(
    memory: Memory, on_gpu: LoadedModel, model: LoadedModel, tmp_path: Path, kind: str, policy: str, refresh: str
) -> None:
    """Three levels, a question, what it brings in, and the memory opened again."""
    settings: dict[str, object] = {"gist_kind": kind, "policy": policy, "refresh": refresh, "archive_kv": 4}
    if "lensnet" in policy:
        net = LensNet.untrained(model.decoder, width=32, n_heads=2, ffn_dim=32, head_dim=16)
        net.save(tmp_path / "lens.safetensors")
        settings["lensnet"] = tmp_path / "lens.safetensors"
    lengths, stored = [], []
    for name, one in (("gpu", on_gpu), ("cpu", model)):
        session = memory(name, model=one, **settings)
        session.ingest(words(700))
        keys, values = session.tree.kv(2, range(8))
        stored.append((session.tree.summaries(2, 0, 8).float().clone(), keys.float(), values.float()))
        session.generate("what of the dog?", max_new_tokens=12, temperature=0)
        session.generate("and the sea?", max_new_tokens=12, seed=1, temperature=0.8)
        assert len(session.generate(["Who?", "And where is the dog?"], max_new_tokens=6)) == 2
        session.focus_on("bread and rain")
        session.pin((200, 216))
        check_session(session)
        session.close()
        session = memory(name, model=one, **settings)
        session.generate("and now?", max_new_tokens=5)
        session.tree.verify()
        lengths.append(session.tree.count(3))
    assert lengths[0] == lengths[1] > 0
    for got, expected in zip(*stored, strict=True):
        assert (got - expected).norm() <= 0.02 * expected.norm()
