"""Several prompts over one memory: each on its own branch of the Working Context, decoded together.

A branch is refocused for its own prompt. Nothing of a batch is remembered: what is read and said there has no gists to
be collapsed to. A prompt has to fit in the budget as tokens, and an answer ends where the budget is full.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .context import WorkingContext
from .errors import BudgetError
from .focus.controller import FocusController
from .model import LoadedModel
from .sampling import Sampler, SamplingParams, StopStrings
from .stats import TurnStats
from .turns import Turn

logger = logging.getLogger("mc_runtime")
# Prompts of a list that are answered together: each has a copy of the cache.
BATCH_ROWS = 16


def answer_prompts(
    model: LoadedModel, context: WorkingContext, focus: FocusController, prompts: Sequence[str], params: SamplingParams
) -> tuple[list[str], list[TurnStats]]:
    """The answers as text, stop strings heeded, and what each turn measured; `BATCH_ROWS` prompts at a time. Raises
    BudgetError for a prompt that does not fit, naming it."""
    with torch.inference_mode():
        focus.make_room(context, 0)  # brings in what was ingested, once for all branches
    answers, stats = list[list[int]](), list[TurnStats]()
    for first in range(0, len(prompts), BATCH_ROWS):
        said, measured = answer_batch(model, context, focus, prompts[first : first + BATCH_ROWS], params)
        answers, stats = answers + said, stats + measured
    texts = []
    for ids, turn in zip(answers, stats, strict=True):
        stops = StopStrings(params.stop)
        texts.append(stops.push(model.tokenizer.decode(ids)) + stops.flush())
        if stops.hit:
            turn.finish_reason = "stop"
    return texts, stats


@torch.inference_mode()
def answer_batch(
    model: LoadedModel,
    context: WorkingContext,
    focus: FocusController,
    prompts: Sequence[str],
    params: SamplingParams,
) -> tuple[list[list[int]], list[TurnStats]]:
    """Token ids of the answers, end tokens excluded, and what each turn measured. Raises BudgetError for a prompt that
    does not fit, naming it."""
    engine, cache = context.engine, context.cache.stacked(len(prompts))
    turns = [Turn(model, context.fork(cache.row(b)), focus.branch(), None) for b in range(len(prompts))]
    samplers = [Sampler(params, model.tokenizer.vocab_size) for _ in prompts]
    logits = [_read(turn, model.chat.user_turn_ids(text), text) for turn, text in zip(turns, prompts, strict=True)]
    answers: list[list[int]] = [[] for _ in prompts]
    active, full = list(range(len(prompts))), set[int]()
    while active:
        tokens = {}
        for b in active:
            token = samplers[b](logits[b])
            if token not in model.tokenizer.eos_ids:
                answers[b].append(token)
                tokens[b] = token
        active = [b for b in active if b in tokens and len(answers[b]) < params.max_new_tokens]
        if not active:
            break
        device = cache.pos.device
        # A finished row runs along as padding: position -1, written behind its own used slots or over its last one.
        at = [min(turn.context.used, cache.capacity - 1) for turn in turns]
        slots = torch.tensor(at, device=device)[:, None]
        positions = torch.tensor([[at[b] if b in active else -1] for b in range(len(turns))], device=device)
        ids = torch.tensor([[tokens.get(b, 0)] for b in range(len(turns))], device=device)
        for b in active:
            cache.pos[b, at[b]] = at[b]
        output = engine.forward(
            engine.embed(ids),
            positions,
            cache.writer(slots, max(at) + 1),
            return_mass=focus.policy.needs_mass,
            logits=True,
        )
        assert output.logits is not None
        for b in active:
            turn = turns[b]
            turn.context.extend([tokens[b]])
            mass = None if output.mass is None else output.mass[:, b : b + 1, turn.context.slots]
            try:
                logits[b] = turn.after_step(tokens[b], output.logits[b], mass)
            except BudgetError:
                full.add(b)
        active = [b for b in active if b not in full]
    if full:
        logger.warning(
            "%d answers of a list end early: the budget is full, and nothing of them is collapsed", len(full)
        )
    for b, (turn, answer) in enumerate(zip(turns, answers, strict=True)):
        turn.stats.finish_reason = "length" if b in full or len(answer) == params.max_new_tokens else "stop"
    return answers, [turn.stats for turn in turns]


def _read(turn: Turn, ids: Sequence[int], text: str) -> Tensor:
    try:
        return turn.read(ids, text)
    except BudgetError as error:
        raise BudgetError(
            f"prompt: {text[:40]!r} of a list, {len(ids)} tokens, does not fit beside the history; a single prompt, "
            f"which is remembered, may be of any length ({error})"
        ) from None
