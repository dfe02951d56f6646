"""The chunked losses against plain ones, and what the small ones measure."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mc_runtime.train import losses
from mc_runtime.train.losses import bag_loss, distillation_loss, hidden_loss, neighbour_loss, nll_rows


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


def test_bag_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "ROWS", 4)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(23, 6, generator=generator)
    hidden = torch.randn(11, 6, generator=generator, requires_grad=True)
    tokens = torch.randint(5, (11, 8), generator=generator)  # repeated tokens count as often as they come
    loss = bag_loss(hidden, tokens, head)
    (3 * loss).backward()
    got, hidden.grad = hidden.grad, None
    want = -F.log_softmax(hidden @ head.T, -1).gather(1, tokens).mean()
    (3 * want).backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(got, hidden.grad)


def test_neighbours_are_pushed_apart_up_to_the_margin() -> None:
    same = torch.ones(2, 3, 4)
    assert neighbour_loss(same, 0.2) == pytest.approx(0.2)
    apart = torch.eye(3).expand(2, 3, 3)
    assert neighbour_loss(apart, 0.2) == 0.0
    # One pair at distance 0, one at 1.
    mixed = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = neighbour_loss(mixed, 0.2)
    assert loss.detach() == pytest.approx(0.1)
    assert neighbour_loss(torch.ones(2, 1, 4), 0.2) == 0.0


def test_hidden_states_count_by_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(50, 4, generator=generator) * torch.tensor([1.0, 1.0, 1.0, 500.0])
    assert hidden_loss(teacher, teacher) == 0.0
    mean = teacher.mean(0).expand_as(teacher)
    assert hidden_loss(mean, teacher) == pytest.approx(1.0, rel=1e-3)
    small, large = teacher.clone(), teacher.clone()
    small[:, 0], large[:, 3] = mean[:, 0], mean[:, 3]
    assert hidden_loss(small, teacher) == pytest.approx(0.25, rel=1e-3)
    assert hidden_loss(large, teacher) == pytest.approx(0.25, rel=1e-3)
