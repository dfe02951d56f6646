"""SnapKV (Li et al. 2024): per layer and KV head, the exact tokens that the recent tokens attend to most."""

from __future__ import annotations

import torch
from torch import Tensor

from mc_kernels.rope import apply_rope

from ..pasts import Kept, Past, take


def attention_mass(past: Past) -> Tensor:
    """Probability that the recent tokens give each far token, summed over queries and the heads of a group,
    [L, B, Hkv, far]; attention in full context."""
    rope, device = past.decoder.rope, past.ids.device
    recent = torch.arange(past.far, past.far + past.recent, device=device)
    out = []
    for k, q in zip(past.k, past.queries, strict=True):
        group = q.shape[1] // k.shape[1]
        keys = apply_rope(k.float(), torch.arange(past.far, device=device), rope)
        queries = apply_rope(q.float(), recent, rope).unflatten(1, (k.shape[1], group))
        logits = torch.einsum("bhgtd,bhsd->bhgts", queries, keys) * k.shape[-1] ** -0.5
        out.append(torch.softmax(logits, dim=-1).sum(dim=(2, 3)))
    return torch.stack(out)


class SnapKV:
    """kernel: width of the max pooling over neighbours that keeps what is selected in clusters (1: none)."""

    def __init__(self, kernel: int = 1) -> None:
        self.kernel = kernel
        self.name = "attention mass (SnapKV)" if kernel == 1 else f"attention mass, clustered {kernel} (SnapKV)"

    def keep(self, past: Past, slots: int) -> Kept:
        mass = attention_mass(past)
        if self.kernel > 1:
            flat = mass.flatten(0, 2)[:, None]
            mass = torch.nn.functional.max_pool1d(flat, self.kernel, 1, self.kernel // 2)[:, 0].view_as(mass)
        mass[..., 0] = -1.0  # the sink is there already
        index = mass.topk(slots, dim=-1).indices.sort(dim=-1).values
        # Heads keep different tokens: one position per slot is the mean of theirs.
        position = index.float().mean(dim=(0, 2)).round().long()
        return Kept(take(past.k, index), take(past.v, index), position)
