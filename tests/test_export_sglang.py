"""The proof by the real engine: SGLang holds every tensor that was exported, and drafts what the draft says.

The target is clockwork: its layers add nothing, and after token x comes f(x), whatever stood before. The draft is
built to know that. Its attention looks at its own column only, and turns the state into the embedding of the token
that the column reads; its head then names f of that token. So every draft is accepted, if and only if names, chunks,
the map of the vocabulary, the shift of the tokens and the recurrent state are as SGLang understands them.
"""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from specbatch.export import export
from specbatch.inference.cpu_speculative import SELECT
from specbatch.inference.server import SGLangServer
from specbatch.target import read_target
from tests.test_export import make_run, random_draft
from tests.tiny_target import make_tiny_target

KEPT = 320
"""Tokens of the draft's vocabulary; f stays among them. SGLang pads a head to a multiple of 64 rows."""
HALF = 32
"""Number of values that embeddings use: as many as two key-value heads have."""


def clockwork(folder):
    """The target, and f as a map from token to token."""
    make_tiny_target(folder)
    generator = torch.Generator().manual_seed(7)
    embedding = torch.zeros(512, 64)
    embedding[:, :HALF] = torch.randn(512, HALF, generator=generator)
    embedding = (embedding / embedding.square().mean(1, keepdim=True).sqrt()).bfloat16()
    kept = 3 + torch.randperm(509, generator=generator)[:KEPT]
    follows = torch.arange(512)
    follows[kept] = kept.roll(-1)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
        if name.endswith("norm.weight"):
            tensor.fill_(1)
    weights["model.embed_tokens.weight"] = embedding
    weights["lm_head.weight"] = torch.empty_like(embedding).index_copy_(0, follows, embedding)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return embedding.float(), follows, kept


def knowing_draft(target, embedding, follows, kept):
    """A draft that names f of the token that its column reads."""
    draft = random_draft(target, KEPT)
    ids = kept.sort().values
    eye, zero = torch.eye(64), torch.zeros(64, 64)
    own = torch.zeros(HALF, 64)
    own[:, :HALF] = torch.eye(HALF)
    # Query heads 0 and 1 read the first key-value head, 2 and 3 the second: both halves of a pair say the same.
    queries = torch.cat([own[:16], own[:16], own[16:], own[16:]])
    output = torch.zeros(64, 64)
    for head, rows in enumerate((slice(0, 16), slice(0, 16), slice(16, 32), slice(16, 32))):
        output[rows, 16 * head : 16 * (head + 1)] = 0.5 * torch.eye(16)
    attention = "layers.0.self_attn"
    return draft | {
        "fc.weight": torch.cat([0.5 * eye, 0.25 * eye, 0.25 * eye], 1),
        f"{attention}.q_proj.weight": 8 * torch.cat([queries, zero], 1),
        f"{attention}.k_proj.weight": 8 * torch.cat([own, zero[:HALF]], 1),
        f"{attention}.v_proj.weight": torch.cat([own, -own], 1),
        f"{attention}.o_proj.weight": output,
        "layers.0.mlp.down_proj.weight": torch.zeros(64, 96),
        "lm_head.weight": embedding[follows.argsort()[ids]],
        "draft_ids": ids,
        **{name: torch.ones(64) for name in draft if "norm" in name},
    }


def with_own_embedding(draft, embedding):
    """The same draft on an embedding of its own, which says the opposite of the target's."""
    name = "layers.0.self_attn.v_proj.weight"
    own, state = draft[name].chunk(2, dim=1)
    return draft | {"embed_tokens.weight": -embedding, name: torch.cat([-own, state], 1)}


def held(checker):
    """Name to checksum of the parameters of SGLang's draft, which its checker tells apart from the target's."""
    sums = checker["ranks"][0]["checksums"]
    return {name.removeprefix("draft."): value for name, value in sums.items() if name.startswith("draft.")}


def fused(tensors, embedding):
    """The parameters into which SGLang puts the tensors of a draft, checksums in its way."""
    layer = "layers.0"
    names = {"norm", "fc", *(f"{layer}.{n}" for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm"))}
    names |= {f"{layer}.self_attn.o_proj", f"{layer}.mlp.down_proj"}
    parts = {f"model.{name}.weight": [tensors[f"{name}.weight"]] for name in names}
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    parts[f"model.{attention}.qkv_proj.weight"] = [tensors[f"{attention}.{x}_proj.weight"] for x in "qkv"]
    parts[f"model.{mlp}.gate_up_proj.weight"] = [tensors[f"{mlp}.{x}_proj.weight"] for x in ("gate", "up")]
    parts |= {"lm_head.weight": [tensors["lm_head.weight"]], "model.embed_tokens.weight": [embedding]}
    return {name: checksum(*tensors) for name, tensors in parts.items()}


def checksum(*parts):
    joined = torch.cat(parts).float().contiguous()
    return hashlib.sha256(joined.numpy().tobytes()).digest()[:8].hex()


@pytest.mark.light
@pytest.mark.timeout(600)
@pytest.mark.parametrize("own_embedding", [False, True])
def test_sglang_holds_what_was_exported_and_accepts_a_draft_that_knows(tmp_path, own_embedding):
    embedding, follows, kept = clockwork(tmp_path / "target")
    target = read_target(tmp_path / "target")
    draft = knowing_draft(target, embedding, follows, kept)
    if own_embedding:
        draft, embedding = with_own_embedding(draft, embedding), -embedding
    run = make_run(tmp_path / "run", tmp_path / "target", vocab=KEPT, **draft)
    folder = export(run)
    arguments = {
        "model_path": tmp_path / "target",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
        "max_running_requests": 2,
        "max_total_tokens": 512,
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": folder,
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
    }
    prompt = kept[:6].tolist()
    expected = kept[6:39].tolist()
    with SGLangServer(arguments, tmp_path / "log", {SELECT: "1"}, threads=1) as server:
        answer = server.generate(
            {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 33, "ignore_eos": True}}
        )
        checker = server.get("/weights_checker")
    assert answer["output_ids"] == expected
    assert answer["meta_info"]["spec_verify_ct"] == 8, "four tokens at once, every time"
    assert held(checker) == fused(load_file(folder / "model.safetensors"), embedding)
