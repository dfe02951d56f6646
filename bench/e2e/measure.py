"""The measurements of `e2e`, one after the other."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench.e2e import rivals
from bench.e2e.decode import decode_in_turn
from bench.e2e.fill import bytes_per_token, read_sample
from bench.e2e.first_token import longest_question, measure_fast_ingest, measure_memory
from bench.e2e.history import history
from bench.e2e.memories import MemoryRun
from bench.e2e.report import EndToEndReport
from bench.e2e.tables import profile_tables
from bench.e2e.trace import profile_turn
from bench.machine import commit, describe
from mc_runtime import MemoryConfig
from mc_runtime.errors import StorageFullError
from mc_runtime.model import LoadedModel, load_model

# An answer is long enough for a refocus while decoding.
LEAST_ANSWER = 36
# Tokens whose gists the long memories get, and of the text that fast ingest is timed on.
SAMPLE_TOKENS, FAST_TOKENS = 1_024, 100_000


@dataclass(frozen=True)
class Plan:
    """lengths: tokens in the tree. windows: tokens that a rival sees. steps: tokens decoded by each."""

    lengths: tuple[int, ...]
    windows: tuple[int, ...]
    budget: int
    steps: int
    model: str
    peers: bool
    text: str

    @property
    def answer_tokens(self) -> int:
        return max(LEAST_ANSWER, -(-self.steps // 3))

    def settings(self, model: LoadedModel) -> dict[str, Any]:
        """For the report."""
        kept = ("model", "budget", "steps", "answer_tokens", "lengths", "windows")
        return {name: getattr(self, name) for name in kept} | {"dtype": str(model.decoder.dtype).removeprefix("torch.")}


def measure(plan: Plan, console: Console, profile: Path | None = None) -> EndToEndReport:
    """Everything, with a progress bar. profile: folder for the trace of one turn of the longest memory."""
    model = load_model(plan.model)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    report = EndToEndReport(commit(), now, describe(model.decoder.device), plan.settings(model))
    report.skipped = rivals.absent(plan.model, wanted=plan.peers)
    room = longest_question(model) + plan.steps
    fitting = [window for window in plan.windows if room < window <= model.config.max_positions]
    texts = {window: history(plan.text, model.tokenizer, window - room) for window in fitting}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory() as folder,
        ExitStack() as stack,
        Progress(*columns, console=console, transient=True) as bar,
    ):
        _first_tokens(report, plan, model, texts, Path(folder), bar)
        windows: Sequence[rivals.ReadWindow] = ()
        if "transformers" not in report.skipped and texts:
            task = bar.add_task("transformers reads its windows", total=len(texts))
            windows = rivals.read_windows(model, texts, lambda: bar.advance(task))
        memories = _memories(plan, model, Path(folder), bar, stack)
        task = bar.add_task("decoding in alternation, tokens", total=plan.steps)
        peers = [read.window for read in windows]
        decode_in_turn(memories, peers, plan.steps, _shown(bar, task))
        report.decode = [memory.row() for memory in memories]
        report.rivals = [rivals.transformers_row(read) for read in windows]
        if profile is not None:
            memories[-1].end_answer()
            for table in profile_tables(*profile_turn(memories[-1].session, profile)):
                bar.console.print(table)
        if "llama.cpp" not in report.skipped:
            task = bar.add_task("llama.cpp", total=len(texts))
            for window, ids in texts.items():
                report.rivals.append(rivals.llama_cpp_row(plan.model, model, window, ids, plan.steps))
                bar.advance(task)
    return report


def _shown(bar: Progress, task: TaskID) -> Callable[[int], None]:
    """Puts how much is done on the bar."""
    return lambda done: bar.update(task, completed=done)


def _first_tokens(
    report: EndToEndReport,
    plan: Plan,
    model: LoadedModel,
    texts: dict[int, NDArray[np.int64]],
    folder: Path,
    bar: Progress,
) -> None:
    """Memories of texts that a rival's window holds too; the longest one's ingest is the contextual rate. And the rate
    of fast ingest."""
    if texts:  # the first forwards of a process are slower
        measure_memory(folder / "warm-up", model, texts[min(texts)][:128], plan.budget, lambda done: None)
    text = history(plan.text, model.tokenizer, min(FAST_TOKENS, plan.lengths[-1]))
    for window, ids in texts.items():
        task = bar.add_task(f"ingest through the model, {len(ids):,} tokens", total=len(ids))
        row = measure_memory(folder / f"window-{window}", model, ids, plan.budget, _shown(bar, task))
        report.first_token.append({"window": window, **row})
        rate = {"tokens": row["tokens"], "seconds": row["ingest_s"], "tokens_per_s": row["ingest_tokens_per_s"]}
        report.ingest["contextual"] = rate
    report.ingest["fast"] = measure_fast_ingest(folder / "fast", model, text, plan.budget)


def _memories(plan: Plan, model: LoadedModel, folder: Path, bar: Progress, stack: ExitStack) -> list[MemoryRun]:
    """One per length, asked once, closed with `stack`. Raises StorageFullError, before anything is written, if the disk
    cannot hold them."""
    needed = sum(plan.lengths) * bytes_per_token(model, MemoryConfig().block_size) * 1.05
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageFullError(
            f"{folder} has {free / 1e9:.1f} GB free, memories of these lengths take {needed / 1e9:.1f} GB; "
            "set TMPDIR to another place or give shorter --tokens"
        )
    everything = history(plan.text, model.tokenizer, max(plan.lengths[-1], SAMPLE_TOKENS))
    sample = read_sample(folder / "sample", model, everything[:SAMPLE_TOKENS])
    runs = []
    for length in plan.lengths:
        task = bar.add_task(f"filling a memory of {length:,} tokens", total=length)
        run = MemoryRun(
            folder / str(length),
            model,
            everything[:length],
            sample,
            budget=plan.budget,
            answer_tokens=plan.answer_tokens,
            progress=_shown(bar, task),
        )
        stack.callback(run.close)
        run.ready()  # before the next one takes memory
        runs.append(run)
    return runs
