"""Windows of which a question decides what matters."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from mc_runtime.model import LoadedModel
from mc_runtime.train.lens_questions import Article, draw_question

from .focus import Asking, FocusSetting


def draw_asking(model: LoadedModel, articles: list[Article], setting: FocusSetting, size: int) -> tuple[Tensor, Asking]:
    """n windows [n, far + recent + targets] that end in a question's turn and its answer, and what is asked."""
    rng = random.Random(f"questions {setting.seed}")
    drawn = [
        draw_question(rng, model, articles, setting.far, setting.recent, setting.targets, size)
        for _ in range(setting.n)
    ]
    windows = torch.from_numpy(np.stack([one.ids for one in drawn])).to(model.decoder.device)
    return windows, Asking(
        tuple(one.known for one in drawn),
        tuple(one.answer_block for one in drawn),
        tuple(one.question for one in drawn),
    )
