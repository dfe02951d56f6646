"""`bench/run.py e2e` on a tiny model: the report's form, the trace, the plot, and what its parts promise."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from typer.testing import CliRunner

from bench.e2e import command, history, rivals
from bench.e2e.fill import bytes_per_token, fill, read_sample
from bench.e2e.forward import _native, _transformers
from bench.e2e.memories import memory_settings
from bench.e2e.process import disk_usage
from bench.e2e.report import EndToEndReport, Spread
from bench.run import app
from mc_runtime import Session
from mc_runtime.model import load_model
from mc_runtime.nodes import Nodes

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a random Llama whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def run(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """Folder with all that one quick run writes, what it printed, and its report."""
    folder = tmp_path_factory.mktemp("run")
    arguments = ["e2e", "--quick", "--model", tiny_model, "--tokens", "400", "--tokens", "3000", "--steps", "120"]
    arguments += ["--out", str(folder / "report.json"), "--plot", str(folder), "--profile", str(folder)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return folder, result.output, json.loads((folder / "report.json").read_text())


def positive(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) and value > 0 for value in values)


def test_the_report_says_what_was_run(run: tuple[Path, str, dict[str, Any]]) -> None:
    report = run[2]
    assert list(report) == [
        "commit", "date", "machine", "settings", "ingest", "first_token", "decode", "rivals", "skipped", "seconds",
    ]  # fmt: skip
    assert report["machine"]["torch"] == torch.__version__
    assert report["settings"]["budget"] == 512
    assert report["settings"]["lengths"] == [400, 3000]
    for mode in ("contextual", "fast"):
        row = report["ingest"][mode]
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"], rel=0.2)


def test_every_length_has_its_row(run: tuple[Path, str, dict[str, Any]]) -> None:
    rows = run[2]["decode"]
    assert [row["tokens"] for row in rows] == [400, 3000]
    for row in rows:
        low, high = row["spread"]
        assert low <= row["ms_per_token"] <= high
        assert row["steps"] >= 120
        names = ("ms_per_token", "ms_per_token_all_in", "ms_per_refocus", "first_turn_s", "first_token_s", "open_s")
        assert positive(*(row[name] for name in names)), row
        assert row["ms_per_token_all_in"] > low
        parts = row["turn_refocus_parts_ms"]
        assert set(parts) == {"refocus", "index", "score", "allocate", "splice", "recompute"}
        assert parts["refocus"] >= max(parts.values())
        assert row["disk_bytes"] > row["tokens"] * 4
        assert 0 < row["slots"] <= 512
    first = run[2]["first_token"]
    assert [row["window"] for row in first] == [256, 512]
    assert all(positive(row["first_question_s"], row["later_question_s"], row["ingest_tokens_per_s"]) for row in first)


def test_rivals_are_measured_or_skipped_with_a_reason(run: tuple[Path, str, dict[str, Any]]) -> None:
    report = run[2]
    rows = [row for row in report["rivals"] if row["name"] == "transformers"]
    assert [row["window"] for row in rows] == [256, 512]
    assert all(positive(row["prefill_s"], row["question_s"], row["ms_per_token"]) for row in rows)
    assert all(row["question_s"] < row["prefill_s"] for row in rows)
    assert "llama.cpp" in report["skipped"]  # the model is no GGUF file
    assert "llama.cpp skipped" in run[1]


def test_the_trace_holds_our_ranges(run: tuple[Path, str, dict[str, Any]]) -> None:
    events = json.loads((run[0] / "turn.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"prefill", "refocus", "index", "score", "allocate", "splice", "recompute", "decode"} <= names
    assert any(str(name).startswith("aten::") for name in names)
    assert "refocus/recompute" in run[1]


def test_the_plot_is_an_image(run: tuple[Path, str, dict[str, Any]]) -> None:
    assert (run[0] / "latency_per_token.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens"),
        (["--budget", "0"], "--budget"),
        (["--steps", "-1"], "--steps"),
        (["--peers", "some"], "--peers"),
        (["--out", "report.txt"], "--out"),
    ],
)
def test_options_are_checked(arguments: list[str], message: str) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["e2e", "--quick", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_an_error_of_the_user_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["e2e", "--quick", "--model", "no such model"])
    assert result.exit_code == 2
    assert "no model at" in result.output
    assert "Traceback" not in result.output

    def no_book() -> str:
        raise history.BookError("is the package index reachable?")

    monkeypatch.setattr(command, "read_book", no_book)
    result = CliRunner().invoke(app, ["e2e"])
    assert result.exit_code == 2
    assert "reachable" in result.output


def test_without_peers_none_is_looked_for() -> None:
    assert set(rivals.absent("smollm2-135m", wanted=False)) == {"transformers", "llama.cpp"}


def test_histories_share_their_beginning(tiny_model: str) -> None:
    tokenizer = load_model(tiny_model).tokenizer
    text = history.made_up_text(400)
    short, long = (history.history(text, tokenizer, n) for n in (500, 9_001))
    assert (len(short), len(long)) == (500, 9_001)
    assert np.array_equal(short, long[:500])
    whole = len(tokenizer.encode(text))
    assert not np.array_equal(long[:whole], long[whole : 2 * whole])
    assert sorted(long[:whole]) == sorted(long[whole : 2 * whole])
    with pytest.raises(ValueError, match="length"):
        history.history(text, tokenizer, 0)


def test_spread() -> None:
    spread = Spread.of([1.0, 2.0, 3.0, 4.0, 5.0], 10)
    assert (spread.low, spread.median, spread.high, spread.count) == (20, 30, 40, 5)
    assert spread.text() == "30.0 (20.0 to 40.0)"
    assert Spread.of([]).text() == "-"


def test_a_report_is_json_whatever_is_in_it(tmp_path: Path) -> None:
    report = EndToEndReport("c", "d", {}, {"x": float("nan")}, decode=[{"spread": (1.0, float("inf"))}])
    report.save(tmp_path / "sub" / "report.json")
    read = json.loads((tmp_path / "sub" / "report.json").read_text())
    assert read["settings"]["x"] is None
    assert read["decode"][0]["spread"] == [1.0, None]


def test_memories_that_do_not_fit_the_disk_are_refused(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = CliRunner().invoke(app, ["e2e", "--quick", "--model", tiny_model, "--peers", "none", "--tokens", "400"])
    assert result.exit_code == 2
    assert "TMPDIR" in result.output


def test_a_filled_memory_is_whole(tiny_model: str, tmp_path: Path) -> None:
    """Parents, flags and documents as if the model had read it; and it can be asked."""
    model = load_model(tiny_model)
    ids = history.history(history.made_up_text(400), model.tokenizer, 3_000)
    sample = read_sample(tmp_path / "sample", model, ids[:200])
    done: list[int] = []
    with Session.open(tmp_path / "memory", model, **memory_settings(512)) as session:
        fill(session, ids, sample, done.append)
        tree = session.tree
        assert done[-1] == len(ids)
        assert tree.count(1) == tree.length // 32
        assert tree.count(2) == tree.length // 32**2
        assert tree.documents()[-1].stop == tree.length
        k, _ = tree.kv(1, [tree.count(1) - 1])
        assert torch.equal(k[0], sample.k[(tree.count(1) - 1) % len(sample)])  # type: ignore[index]
        tree.verify()
        assert session.generate("what did the fox say?", max_new_tokens=3) is not None
        per_token = disk_usage(tmp_path / "memory") / tree.length
        assert per_token < 3 * bytes_per_token(model, 32) + 100
    with pytest.raises(ValueError, match="sample"):
        fill(session, ids, Nodes(sample.summary))


def test_engines_decode_the_same_model_in_alternation(tiny_model: str) -> None:
    result = CliRunner().invoke(app, ["engines", "--model", tiny_model, "--entries", "20", "--steps", "4"])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines() if "│" in line]
    assert [row[1] for row in rows] == ["native", "transformers", "transformers,"]
    assert rows[0][-2] == "1.00"
    wrong = CliRunner().invoke(app, ["engines", "--model", tiny_model, "--steps", "0"])
    assert wrong.exit_code == 2
    assert "expected at least 1" in wrong.output


def test_forward_gives_what_transformers_gives(tiny_model: str) -> None:
    """A line for each number of rows, and the same logits in both."""
    arguments = ["forward", "--model", tiny_model, "--entries", "9", "--rows", "1", "--rows", "40", "--dtype", "fp32"]
    result = CliRunner().invoke(app, [*arguments, "--repeats", "2"])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines() if "│" in line]
    assert [row[1] for row in rows] == ["1", "40"]
    decoder = load_model(tiny_model, dtype=torch.float32).decoder
    ids = torch.arange(40) % decoder.config.vocab_size
    with torch.inference_mode():
        ours, (theirs, undo) = _native(decoder, ids, 9), _transformers(decoder, ids, 9)
        for n in (31, 1, 31):
            torch.testing.assert_close(ours(n), theirs(n), rtol=1e-4, atol=1e-4)
            undo(n)
    for wrong in (["--rows", "0"], ["--dtype", "int8"], ["--entries", "1000000"]):
        refused = CliRunner().invoke(app, [*arguments, *wrong])
        assert refused.exit_code == 2
        assert "expected" in refused.output
