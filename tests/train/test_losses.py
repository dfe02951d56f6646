"""The chunked loss against the plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mc_runtime.train import losses
from mc_runtime.train.losses import distillation_loss, nll_rows


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_value_and_gradient(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "ROWS", 4)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(23, 6, generator=generator)
    hidden = torch.randn(11, 6, generator=generator, requires_grad=True)
    teacher = torch.randn(11, 6, generator=generator)
    targets = torch.randint(23, (11,), generator=generator)
    loss, nll = distillation_loss(hidden, teacher, targets, head, share)
    (3 * loss).backward()
    got, hidden.grad = hidden.grad, None
    log_p = F.log_softmax(hidden @ head.T, -1)
    kl = F.kl_div(log_p, F.log_softmax(teacher @ head.T, -1), log_target=True, reduction="batchmean")
    ce = F.nll_loss(log_p, targets)
    want = share * kl + (1 - share) * ce
    (3 * want).backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(nll, ce)
    torch.testing.assert_close(got, hidden.grad)
    torch.testing.assert_close(nll_rows(hidden.detach(), targets, head).mean(), ce)


def test_a_share_needs_a_teacher() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="share"):
        distillation_loss(x, None, torch.zeros(2, dtype=torch.int64), torch.zeros(4, 3), 0.5)
    assert nll_rows(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.zeros(4, 3)).shape == (0,)
