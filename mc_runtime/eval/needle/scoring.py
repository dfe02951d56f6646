"""Is a reply right: by what it says, and by which candidate it finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mc_runtime.train.lens_questions import says

from ..readers import Question, Reply
from ..statistics import Estimate, bootstrap, wilson


def generated(question: Question, reply: Reply) -> float:
    """Share of the answers that the reply contains."""
    return sum(says(reply.text, answer) for answer in question.answers) / len(question.answers)


def ranked_first(question: Question, reply: Reply) -> bool:
    """Whether the right candidate is likelier than every other; a tie is no."""
    right, *wrong = reply.logprobs
    return all(right > other for other in wrong)


def share(values: Sequence[float]) -> Estimate:
    """Mean with a 95% interval: Wilson's where each value is 0 or 1, else bootstrap over questions."""
    if all(value in (0.0, 1.0) for value in values):
        return wilson(int(sum(values)), len(values))
    return bootstrap(lambda x: float(x.mean()), np.asarray(values, np.float64))
