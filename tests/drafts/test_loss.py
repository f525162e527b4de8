"""The fused loss on its own: precision, memory, and what it refuses."""

from __future__ import annotations

import torch
from torch import Tensor

from specbatch.drafts import memory
from specbatch.drafts.fused import rms_norm
from specbatch.drafts.loss import Gradients, Heads, LossRows, distill

POSITIONS, WIDTH, VOCAB, EPS = 60, 32, 400, 1e-5


class GoodDraft:
    """A draft whose logits are the target's, but for a little: what a rounded logit hides."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        last, head = random(POSITIONS, WIDTH), 3 * random(VOCAB, WIDTH)
        last = last / last.square().mean(-1, keepdim=True).sqrt()
        state = last + 0.01 * random(POSITIONS, WIDTH)
        self.last, self.target_head = last.to(dtype), head.to(dtype)
        self.state, self.head, self.norm = state.to(dtype), head.to(dtype), torch.ones(WIDTH, dtype=dtype)

    @property
    def leaves(self) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in (self.head, self.norm, self.state)]

    def gradients(self, *, frozen: bool = False) -> list[Tensor]:
        """Gradients of head, norm and states, as the fused loss computes them."""
        wide = torch.promote_types(self.head.dtype, torch.float32)
        d_head = None if frozen else torch.zeros_like(self.head, dtype=wide)
        gradients = Gradients(d_head, torch.zeros(WIDTH, dtype=wide))
        rows = torch.arange(POSITIONS)
        heads = Heads(self.head, self.norm, EPS, self.target_head, self.last)
        distill([self.state], [LossRows(rows, rows)], heads, torch.ones(1), gradients)
        return [*([] if d_head is None else [d_head]), gradients.norm_H, *gradients.states]

    def exact(self) -> list[Tensor]:
        """Gradients in float64, where weights, states and their norms, which engines round too, are what they are."""
        head, norm, state = (x.detach().double().requires_grad_() for x in self.leaves)
        truth = (self.last.double() @ self.target_head.double().T).softmax(-1)
        normal = rms_norm(state, norm, EPS)
        normal = normal + (rms_norm(self.state, self.norm, EPS).double() - normal).detach()
        total = -(truth * (normal @ head.T).log_softmax(-1)).sum()
        return list(torch.autograd.grad(total, (head, norm, state)))

    def rounded(self) -> list[Tensor]:
        """Gradients as they are when logits are in the dtype of the weights."""
        truth = (self.last @ self.target_head.T).float().softmax(-1)
        head, norm, state = leaves = self.leaves
        total = -(truth * (rms_norm(state, norm, EPS) @ head.T).float().log_softmax(-1)).sum()
        return list(torch.autograd.grad(total, leaves))


def worst(gradients: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative error of the head's and the states' gradients."""
    return max(((g.double() - e).norm() / e.norm()).item() for g, e in zip(gradients[::2], exact[::2], strict=True))


def test_gradients_of_a_good_draft_are_right_in_bfloat16():
    draft = GoodDraft(torch.bfloat16)
    exact = draft.exact()
    assert worst(draft.gradients(), exact) < 0.02
    assert worst(draft.rounded(), exact) > 0.2


def test_rounding_the_finished_gradient_of_the_logits_costs_little():
    """Checks the case of a GPU, where the gradient of the logits is a factor of bfloat16 products."""
    draft = GoodDraft(torch.bfloat16)
    normal = rms_norm(draft.state, draft.norm, EPS)
    truth = (draft.last.double() @ draft.target_head.double().T).softmax(-1)
    d_logits = (normal.double() @ draft.head.double().T).softmax(-1) - truth
    exact = d_logits.T @ normal.double()
    rounded = d_logits.bfloat16().double().T @ normal.double()
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.005


def test_chunks_add_up(monkeypatch):
    draft = GoodDraft(torch.float64)
    whole = draft.gradients()
    torch.testing.assert_close(whole, draft.exact())
    for size in (1, 7, POSITIONS - 1):
        monkeypatch.setattr(memory, "CPU_UNROLLED_BYTES", size * VOCAB * 4 * 8)
        torch.testing.assert_close(draft.gradients(), whole)


def test_a_frozen_head_gets_no_gradient_and_the_others_are_the_same():
    draft = GoodDraft(torch.float64)
    torch.testing.assert_close(draft.gradients(frozen=True), draft.gradients()[1:])
