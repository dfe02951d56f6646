"""vLLM's OpenAI-compatible server against the native engine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from village import PROMPTS, SETTINGS, fill

from mc_runtime.engines import NativeEngine
from mc_runtime.engines.vllm import VLLMServerEngine
from mc_runtime.errors import InputError, ModelError
from mc_runtime.model import LoadedModel
from mc_runtime.sampling import SamplingParams
from mc_runtime.served import ServedSession

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
READY = 400  # seconds that a server may take to load on a busy machine
KEY = "a key"


@pytest.fixture(scope="module")
def url(installed: None, smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own on the loopback interface, which ends with the module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2.directory),
        "--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enable-prompt-embeds", "--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager",
        "--max-logprobs", "-1", "--api-key", KEY,
    ]  # fmt: skip
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
    try:
        start = time.monotonic()
        while not _ready(f"http://127.0.0.1:{port}/health"):
            text = f"the server did not come up:\n{log.read_text()[-4000:]}"
            assert server.poll() is None, text
            assert time.monotonic() - start < READY, text
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@torch.no_grad()
def test_a_server_says_what_the_native_engine_says(url: str, smollm2: LoadedModel, tmp_path: Path) -> None:
    engine, native = VLLMServerEngine(smollm2.decoder, url, api_key=KEY), NativeEngine(smollm2.decoder)
    assert (engine.model, engine.max_length) == ("smollm2", 1024)
    ids = smollm2.chat.user_turn_ids("Count from one to nine.")
    rows = engine.embed(torch.tensor([ids]))[0]
    contexts = [rows, rows[:-3], torch.cat((rows, rows[3:6].mean(0, keepdim=True)))]
    greedy = native.complete(contexts, SamplingParams(), count=8)
    assert engine.complete(contexts, SamplingParams(), count=8) == greedy
    (ended,) = engine.complete([rows], SamplingParams(), count=6, eos_ids=[greedy[0][2]])
    assert ended == greedy[0][: greedy[0].index(greedy[0][2])]
    logits = [e.prefill(rows, room=0).logits.log_softmax(0) for e in (native, engine)]
    assert (logits[0] - logits[1]).abs().max() < 1e-3
    said = []
    for one in (native, engine):
        with ServedSession.open(tmp_path / one.name, one, smollm2, **SETTINGS) as session:
            fill(session)
            said.append(session.generate(PROMPTS[0], max_new_tokens=6))
    assert said[0] == said[1]


def test_what_a_server_refuses(url: str, smollm2: LoadedModel) -> None:
    with pytest.raises(ModelError, match="AuthenticationError"):
        VLLMServerEngine(smollm2.decoder, url, api_key="another")
    with pytest.raises(ModelError, match=r"expected one that .* serves \(smollm2\), got 'llama'"):
        VLLMServerEngine(smollm2.decoder, url, api_key=KEY, model="llama")
    engine = VLLMServerEngine(smollm2.decoder, url, api_key=KEY)
    with pytest.raises(InputError, match="more than the server's max_model_len, 1024"):
        engine.complete([torch.zeros(1000, smollm2.config.embed_dim)], SamplingParams(), count=25)
    with pytest.raises(ModelError, match="BadRequestError"):
        engine._complete([torch.zeros(4, 8)], SamplingParams(), 4, [])  # another model's vectors


def test_no_server(smollm2: LoadedModel, installed: None) -> None:
    with pytest.raises(ModelError, match="APIConnectionError"):
        VLLMServerEngine(smollm2.decoder, "http://127.0.0.1:9/v1", timeout=2)
