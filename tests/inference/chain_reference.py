"""An EAGLE-3 draft made in a second, and what drafting a chain with it must give: plain PyTorch and transformers.

All weights are random but the head's, which is fitted to some answers: so the draft is right often enough, and every
part of it matters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM

AUX_LAYERS = (1, 2, 4)
THETA = 10000.0
EPS = 1e-5


def make_draft(
    folder: Path, target: Path, prompts: Sequence[Sequence[int]], answer_tokens: int, steps: int, *, norms: bool = False
) -> Path:
    """Write a draft for some prompts; returns its directory.

    Args:
        answer_tokens: of each answer that the head is fitted to.
        steps: drafts of a chain that it is fitted for.
        norms: it is one of EAGLE-3.1: ``fc_norm`` and ``norm_output``.
    """
    model = Target(target)
    answers = [model.greedy(prompt, answer_tokens + steps) for prompt in prompts]
    _write_random(folder, target, sorted({token for answer in answers for token in answer}), norms=norms)
    drafter = Drafter(folder, model)
    found = [drafter.examples(p, a, steps) for p, a in zip(prompts, answers, strict=True)]
    states, tokens = torch.cat([s for s, _ in found]), torch.cat([t for _, t in found])
    choices = (tokens[:, None] == drafter.tokens).float()
    ridge = states.T @ states + 0.1 * torch.eye(states.shape[1])
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.linalg.solve(ridge, states.T @ choices).T.bfloat16().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_random(
    folder: Path, target: Path, token_ids: Sequence[int], seed: int = 0, scale: float = 0.3, *, norms: bool
) -> None:
    """Write a draft that can propose only the given tokens; ``scale`` is large, so that all its parts matter."""
    config = json.loads((target / "config.json").read_text())
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).bfloat16()

    def norm() -> Tensor:
        return (1 + 0.1 * torch.randn(hidden, generator=generator)).bfloat16()

    ids = torch.tensor(sorted(token_ids))
    kept = torch.zeros(vocab, dtype=torch.bool)
    kept[ids] = True
    p = "layers.0."
    tensors = {
        "fc.weight": matrix(hidden, 3 * hidden),
        p + "input_layernorm.weight": norm(),
        p + "hidden_norm.weight": norm(),
        p + "post_attention_layernorm.weight": norm(),
        p + "self_attn.q_proj.weight": matrix(heads * head_dim, 2 * hidden),
        p + "self_attn.k_proj.weight": matrix(kv_heads * head_dim, 2 * hidden),
        p + "self_attn.v_proj.weight": matrix(kv_heads * head_dim, 2 * hidden),
        p + "self_attn.o_proj.weight": matrix(hidden, heads * head_dim),
        p + "mlp.gate_proj.weight": matrix(inner, hidden),
        p + "mlp.up_proj.weight": matrix(inner, hidden),
        p + "mlp.down_proj.weight": matrix(hidden, inner),
        "norm.weight": norm(),
        "lm_head.weight": matrix(len(ids), hidden),
        "d2t": ids - torch.arange(len(ids)),
        "t2d": kept,
    }
    if norms:
        # Far from 1, and from each other, so that an engine that leaves them out is seen.
        tensors |= {f"fc_norm.{number}.weight": 2**number * norm() for number in range(len(AUX_LAYERS))}
        tensors["norm.weight"] = 2 * norm()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    draft = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "draft_vocab_size": len(ids),
        "target_hidden_size": hidden,
        "max_position_embeddings": config["max_position_embeddings"],
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": list(AUX_LAYERS)},
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in AUX_LAYERS],
        **({"fc_norm": True, "norm_output": True} if norms else {}),
    }
    (folder / "config.json").write_text(json.dumps(draft))


class Target:
    """The target by transformers, in float32."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The ``count`` most likely next tokens, past any end token."""
        ids, known = torch.tensor([list(prompt)]), None
        found: list[int] = []
        with torch.no_grad():
            for _ in range(count):
                result = self.model(ids, past_key_values=known, use_cache=True)
                ids, known = result.logits[:, -1].argmax(-1, keepdim=True), result.past_key_values
                found.append(int(ids))
        return found

    def answer(self, prompt: Sequence[int], max_new_tokens: int, eos: Sequence[int]) -> list[int]:
        """The greedy answer, its end token included."""
        tokens = self.greedy(prompt, max_new_tokens)
        ends = [i for i, token in enumerate(tokens) if token in eos]
        return tokens[: ends[0] + 1] if ends else tokens


class Drafter:
    """A draft directory, computed as the paper says."""

    def __init__(self, folder: Path, target: Target) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.w = {
            name: t.float() if t.is_floating_point() else t
            for name, t in load_file(folder / "model.safetensors").items()
        }
        self.tokens = self.w["d2t"] + torch.arange(len(self.w["d2t"]))
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config["head_dim"]
        self.fc_norm, self.norm_output = config.get("fc_norm", False), config.get("norm_output", False)
        self.target = target
        self.embedding = target.model.get_input_embeddings().weight.detach()

    def histogram(self, prompt: Sequence[int], answer: Sequence[int], draft_tokens: int) -> list[int]:
        """Verify steps by accepted drafts, when decoding ``prompt`` until ``answer`` is complete."""
        ids = [*prompt, *self.target.greedy(prompt, len(answer) + draft_tokens)]
        with torch.no_grad():
            z, keys, values = self._columns(ids)
            counts = [0] * (draft_tokens + 1)
            known = len(prompt) + 1  # The prefill gives the first token of the answer.
            while known < len(prompt) + len(answer):
                column = known - 2
                drafts, _ = self._chain(ids[: known - 1], ids[known - 1], z[column], keys, values, draft_tokens)
                accepted = 0
                while accepted < draft_tokens and drafts[accepted] == ids[known + accepted]:
                    accepted += 1
                counts[accepted] += 1
                known += accepted + 1
        return counts

    def examples(self, prompt: Sequence[int], answer: Sequence[int], steps: int) -> tuple[Tensor, Tensor]:
        """Normed states ``[rows, hidden]`` of chains whose drafts are all right, and the tokens to propose."""
        ids, states, tokens = [*prompt, *answer], [], []
        with torch.no_grad():
            z, keys, values = self._columns(ids)
            for known in range(len(prompt) + 1, len(ids) - steps + 1):
                true = ids[known : known + steps]
                states += self._chain(ids[: known - 1], ids[known - 1], z[known - 2], keys, values, steps, true)[1]
                tokens += true
        return torch.stack(states), torch.tensor(tokens)

    def _columns(self, ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """First state, key and value of each column but the last."""
        states = self.target.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        read = [states[layer + 1][0] for layer in AUX_LAYERS]
        if self.fc_norm:
            read = [_rms(layer, self.w[f"fc_norm.{number}.weight"]) for number, layer in enumerate(read)]
        aux = torch.cat(read, dim=-1)
        z = aux[:-1] @ self.w["fc.weight"].T
        _, keys, values = self._project(torch.tensor(ids[1:]), z, torch.arange(len(ids) - 1))
        return z, keys, values

    def _chain(
        self,
        before: Sequence[int],
        token: int,
        z: Tensor,
        keys: Tensor,
        values: Tensor,
        steps: int,
        forced: Sequence[int] | None = None,
    ) -> tuple[list[int], list[Tensor]]:
        """Drafts after ``token``, and the normed states that gave them.

        Args:
            before: the tokens before ``token``; the chain starts from the column of the last of them.
            z: that column's first state.
            keys, values: of all columns.
            forced: go on with these tokens instead of the drafts.
        """
        drafts, states = [], []
        keys, values = keys[: len(before)], values[: len(before)]
        for step in range(steps):
            position = len(before) - 1 + step
            q, k, v = self._project(torch.tensor([token]), z[None], torch.tensor([position]))
            if step:
                keys, values = torch.cat([keys, k]), torch.cat([values, v])
            z = self._rest(q, keys, values, z)
            states.append(_rms(z, self.w["norm.weight"]))
            z = states[-1] if self.norm_output else z
            drafts.append(int(self.tokens[(self.w["lm_head.weight"] @ states[-1]).argmax()]))
            token = forced[step] if forced else drafts[-1]
        return drafts, states

    def _project(self, tokens: Tensor, z: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = "layers.0."
        e = _rms(self.embedding[tokens], self.w[p + "input_layernorm.weight"])
        a = torch.cat([e, _rms(z, self.w[p + "hidden_norm.weight"])], dim=-1)
        q = (a @ self.w[p + "self_attn.q_proj.weight"].T).view(-1, self.heads, self.head_dim)
        k = (a @ self.w[p + "self_attn.k_proj.weight"].T).view(-1, self.kv_heads, self.head_dim)
        v = (a @ self.w[p + "self_attn.v_proj.weight"].T).view(-1, self.kv_heads, self.head_dim)
        return _rope(q, positions), _rope(k, positions), v

    def _rest(self, q: Tensor, keys: Tensor, values: Tensor, z: Tensor) -> Tensor:
        p = "layers.0."
        mixed = scaled_dot_product_attention(
            q.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), enable_gqa=True
        )
        u = z + self.w[p + "self_attn.o_proj.weight"] @ mixed.transpose(0, 1).reshape(-1)
        n = _rms(u, self.w[p + "post_attention_layernorm.weight"])
        inner = silu(self.w[p + "mlp.gate_proj.weight"] @ n) * (self.w[p + "mlp.up_proj.weight"] @ n)
        return u + self.w[p + "mlp.down_proj.weight"] @ inner


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def _rope(x: Tensor, positions: Tensor) -> Tensor:
    """x ``[tokens, heads, head_dim]``."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * THETA ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)
