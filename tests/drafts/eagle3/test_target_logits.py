"""What training takes for the target's distribution, against transformers' own logits on models of these classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from specbatch.drafts.eagle3.model import Eagle3Module
from specbatch.drafts.loss import Gradients, Heads, LossRows, distill, logits_of_target
from specbatch.target import Logits, head_bias, lm_head, read_target
from tests.drafts.eagle3.test_model import make_draft
from tests.drafts.samples import HIDDEN, VOCAB

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": Logits(),
    "gemma2": Logits(1.0, 3.0),
    "granite": Logits(1 / 8),
    "cohere": Logits(0.0625),
    "phi": Logits(),
    "deepseek_v3": Logits(),
}
OWN = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 8.0},
    "deepseek_v3": {
        "head_dim": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path):
    torch.manual_seed(0)
    made = CONFIG_MAPPING[kind](**SMALL | OWN.get(kind, {}))
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
    shape = read_target(tmp_path)
    assert shape.logits == KINDS[kind]
    bias = head_bias(shape)
    assert (bias is not None) == (kind == "phi")
    if kind == "deepseek_v3":
        assert (shape.latent, shape.head_dim) == (True, 8)
    last, head = found.hidden_states[-1][0], lm_head(shape)
    torch.testing.assert_close(logits_of_target(last, head, bias, shape.logits), found.logits[0], rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_cross_entropy_to_what_the_target_samples_from():
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    last, state, head, target_head, bias = random(6, 8), random(6, 8), random(20, 8), random(20, 8), random(20)
    norm, eps, rows = torch.ones(8, dtype=torch.float64), 1e-6, torch.arange(6)
    heads = Heads(head, norm, eps, target_head, last, target_bias_V=bias, target_logits=Logits(0.5, 2.0))
    gradients = Gradients(torch.zeros_like(head), torch.zeros_like(norm))
    result = distill([state], [LossRows(rows, rows)], heads, torch.ones(1), gradients)

    truth = (2 * torch.tanh(0.5 * (last @ target_head.T + bias) / 2)).softmax(-1)
    leaf = head.clone().requires_grad_()
    normal = state * (state.square().mean(-1, keepdim=True) + eps).rsqrt()
    wanted = -(truth * (normal @ leaf.T).log_softmax(-1)).sum()
    wanted.backward()
    torch.testing.assert_close(result[0, 0], wanted.detach())
    torch.testing.assert_close(gradients.head_VH, leaf.grad)


def test_a_draft_begins_with_the_targets_head_as_the_target_scales_it():
    generator = torch.Generator().manual_seed(0)
    table, head = torch.randn(2, VOCAB, HIDDEN, generator=generator)
    bias, ids = torch.randn(VOCAB, generator=generator), (1, 4, 7)
    config = replace(make_draft(2, ids).config, target_logits=Logits(0.25))
    draft = Eagle3Module(config)
    draft.initialize(0, table, head, target_bias=bias)
    assert torch.equal(draft.lm_head.weight, 0.25 * head[list(ids)])
    assert draft.target_head is not None
    assert draft.target_bias is not None
    assert torch.equal(draft.target_head, head[list(ids)])
    assert torch.equal(draft.target_bias, bias[list(ids)])
