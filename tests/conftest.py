"""Read before any test module is: how Triton runs has to be known when it is first imported, by whatever imports it."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
