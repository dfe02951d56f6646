"""Tensor parallelism, which is vLLM's own: a model of which each of two processes holds half of the heads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mc_runtime import Session
from mc_runtime.engines import NativeEngine
from mc_runtime.engines.hf_model import transformers_model
from mc_runtime.engines.vllm import VLLMEngine
from mc_runtime.model import Decoder, LoadedModel, ModelConfig, RopeConfig
from mc_runtime.sampling import SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]  # on a busy machine too
PROCESSES = 2


@pytest.fixture(scope="module")
def model(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Random weights in a directory, with SmolLM2's tokenizer: its own three KV heads cannot be halved. Weights are
    large enough that attention is peaked: a head at the wrong place must show in the answers."""
    config = ModelConfig(
        architecture="llama", vocab_size=smollm2.config.vocab_size, embed_dim=128, n_layers=3, n_heads=8, n_kv_heads=4,
        head_dim=32, ffn_dim=256, norm_eps=1e-5, rope=RopeConfig(theta=10_000.0), max_positions=4096,
        tied_embeddings=True, eos_ids=tuple(smollm2.config.eos_ids),
    )  # fmt: skip
    decoder = Decoder.random(config, seed=3, std=0.2, dtype=torch.float32)
    directory = tmp_path_factory.mktemp("model") / "random"
    transformers_model(decoder).save_pretrained(directory)
    return LoadedModel(decoder, smollm2.tokenizer, smollm2.chat, config, "random", directory)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def parallel(installed: None, model: LoadedModel, files: Path) -> Iterator[VLLMEngine]:
    from mc_runtime.engines.vllm.handover import transfer_config

    engine = VLLMEngine.load(
        model, tensor_parallel_size=PROCESSES, max_model_len=512, max_num_seqs=4, enforce_eager=True,
        disable_log_stats=True, kv_transfer_config=transfer_config(files),
    )  # fmt: skip
    yield engine
    engine.llm.llm_engine.engine_core.shutdown()  # its workers are processes of their own


@torch.inference_mode()
def test_vectors_go_to_all_processes(parallel: VLLMEngine, model: LoadedModel) -> None:
    assert parallel.llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size == PROCESSES
    ids = torch.arange(100, 148)[None]
    rows = parallel.embed(ids)[0]
    rows[20:24] = rows[:20].mean(0)  # as a gist is: no token has this vector
    contexts = [rows, rows[:30], rows.flip(0)]
    said = parallel.complete(contexts, SamplingParams(), count=12)
    assert said == NativeEngine(model.decoder).complete(contexts, SamplingParams(), count=12)
    assert len({tuple(tokens) for tokens in said}) == len(contexts)


@torch.inference_mode()
def test_each_process_takes_its_heads_from_the_connector(
    parallel: VLLMEngine, model: LoadedModel, files: Path, tmp_path: Path
) -> None:
    from test_vllm_connector import native

    from mc_runtime.engines.vllm.handover import complete_from_cache

    settings = {"budget": 192, "recent_tokens": 64, "gist_bias": 0.0, "policy": "retrieval", "gistnet": "untrained"}
    with Session.open(tmp_path / "memory", model, **settings) as session:
        session.ingest("The sea was calm that week, and people mended their nets. " * 40, title="the sea")
        session.generate("What did people mend?", max_new_tokens=3)
        assert (session.context.entries.levels > 0).sum() > 5
        for _ in range(2):
            said = complete_from_cache(parallel, session.context, files, SamplingParams(), count=12)
            assert said == native(session, 12)
            # Values that no reading of the text would give, another in each head.
            v = session.context.cache.v
            v += torch.randn(v.shape, generator=torch.Generator().manual_seed(1)) * v.abs().mean()
