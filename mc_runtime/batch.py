"""Several prompts over one memory: each on its own branch of the Working Context, decoded together.

A branch is refocused for its own prompt. Nothing of a batch is remembered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .context import WorkingContext
from .focus.controller import FocusController
from .model import LoadedModel
from .sampling import Sampler, SamplingParams
from .stats import TurnStats
from .turns import Turn


@torch.inference_mode()
def answer_batch(
    model: LoadedModel,
    context: WorkingContext,
    focus: FocusController,
    prompts: Sequence[str],
    params: SamplingParams,
) -> tuple[list[list[int]], list[TurnStats]]:
    """Token ids of the answers, end tokens excluded, and what each turn measured."""
    engine, cache = context.engine, context.cache.stacked(len(prompts))
    turns = [Turn(model, context.fork(cache.row(b)), focus.branch(), None) for b in range(len(prompts))]
    samplers = [Sampler(params, model.tokenizer.vocab_size) for _ in prompts]
    logits = [turn.read(model.chat.user_turn_ids(text), text) for turn, text in zip(turns, prompts, strict=True)]
    answers: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
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
        )
        for b in active:
            turn = turns[b]
            turn.context.extend([tokens[b]])
            mass = None if output.mass is None else output.mass[:, b : b + 1, turn.context.slots]
            logits[b] = turn.after_step(tokens[b], engine.logits(output.hidden[b, -1]), mass)
    for turn, answer in zip(turns, answers, strict=True):
        turn.stats.finish_reason = "length" if len(answer) == params.max_new_tokens else "stop"
    return answers, [turn.stats for turn in turns]
