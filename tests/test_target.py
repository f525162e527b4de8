"""Targets as their directories describe them, right and wrong: each file here is a real one, changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specbatch.config import load_config
from specbatch.drafts.base import algorithm_of
from specbatch.errors import UserError
from specbatch.target import (
    Logits,
    attention,
    embedding,
    embedding_name,
    fingerprint,
    head_bias,
    head_name,
    lm_head,
    locate,
    read_target,
)

Change = Callable[[dict[str, Any]], None]
Tensors = Callable[[dict[str, torch.Tensor]], None]
Variant = Callable[..., Path]


@pytest.fixture
def variant(tiny_target: Path, tmp_path: Path) -> Variant:
    """Makes a copy of the tiny target with another config.json or other tensors."""

    def make(config: Change | None = None, tensors: Tensors | None = None) -> Path:
        folder = tmp_path / f"target-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_target, folder)
        if config:
            content = json.loads((folder / "config.json").read_text())
            config(content)
            (folder / "config.json").write_text(json.dumps(content))
        if tensors:
            stored = load_file(folder / "model.safetensors")
            tensors(stored)
            save_file(stored, folder / "model.safetensors")
        return folder

    return make


def without_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop("lm_head.weight", None)


def config_of(target: Path, tmp_path: Path, *overrides: str) -> Any:
    path = tmp_path / "a.yaml"
    path.write_text(f"run: {{dir: r}}\ntarget: {{path: '{target}'}}\ndata: {{train: [a]}}\n")
    return load_config(path, overrides)


def test_the_shape_of_a_real_target(smollm):
    shape = read_target(smollm)
    assert (shape.architecture, shape.model_type, shape.dtype) == ("LlamaForCausalLM", "llama", "bfloat16")
    assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (576, 30, 9, 3, 64)
    assert (shape.intermediate, shape.vocab, shape.max_positions, shape.rms_norm_eps) == (1536, 49152, 8192, 1e-5)
    assert (shape.tied, shape.bos, shape.eos, shape.pad) == (True, 1, (2,), 2)
    assert shape.rope == {"rope_theta": 100000.0, "rope_scaling": None}


def test_a_tied_target_without_a_head_has_its_embedding_as_head(variant):
    shape = read_target(variant(lambda config: config.update(tie_word_embeddings=True), without_head))
    assert head_name(shape) == embedding_name(shape) == "model.embed_tokens.weight"
    assert torch.equal(lm_head(shape), embedding(shape))
    assert (lm_head(shape).dtype, tuple(lm_head(shape).shape)) == (torch.bfloat16, (shape.vocab, shape.hidden))


def test_an_untied_target_without_a_head_is_refused_by_tensor_and_file(variant):
    folder = variant(lambda config: config.update(tie_word_embeddings=False), without_head)
    with pytest.raises(UserError, match=r"no tensor lm_head\.weight in model\.safetensors") as caught:
        lm_head(read_target(folder))
    assert str(folder) in str(caught.value)


def test_a_tied_target_that_stores_another_head_uses_its_embedding(variant):
    def other_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])

    shape = read_target(variant(lambda config: config.update(tie_word_embeddings=True), other_head))
    assert torch.equal(lm_head(shape), embedding(shape))
    assert not shape.weights.same("lm_head.weight", "model.embed_tokens.weight")


def test_an_untied_target_has_a_head_of_its_own(tiny_target):
    shape = read_target(tiny_target)
    assert not shape.tied
    assert not torch.equal(lm_head(shape), embedding(shape))


def test_where_config_json_does_not_say_it_the_class_of_the_model_does(variant):
    def left_out(config: dict[str, Any]) -> None:
        config.pop("tie_word_embeddings", None)

    assert not read_target(variant(left_out)).tied
    assert read_target(variant(lambda config: (left_out(config), config.update(model_type="gemma"))[0])).tied


@pytest.mark.parametrize(
    ("config", "theta", "scaling"),
    [
        ({"rope_theta": 5e4}, 5e4, None),
        ({"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5e4, ("linear", 2.0)),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e4}}, 5e4, ("yarn", 4.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, 5e4, None),
        ({"rope_theta": 5e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, 5e4, None),
        (
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                }
            },
            1e6,
            ("linear", 8.0),
        ),
        ({}, 1e4, None),
    ],
)
def test_rope_is_read_in_both_schemas(variant, config, theta, scaling):
    def change(content: dict[str, Any]) -> None:
        for key in ("rope_theta", "rope_scaling", "rope_parameters"):
            content.pop(key, None)
        content.update(config)

    rope = read_target(variant(change)).rope
    assert rope["rope_theta"] == theta
    found = rope["rope_scaling"]
    assert (found and (found["rope_type"], found["factor"])) == scaling
    assert not found or "rope_theta" not in found


def test_positions_count_the_scaling_that_sglang_counts(variant):
    def scaled(**scaling: Any) -> int:
        return read_target(
            variant(lambda config: config.update(max_position_embeddings=1000, rope_scaling=scaling))
        ).max_positions

    assert scaled(rope_type="linear", factor=4.0) == 4000
    assert scaled(rope_type="llama3", factor=4.0) == 1000
    assert scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=250) == 1000


def test_what_is_left_out_of_config_json_has_the_usual_value(variant):
    def change(config: dict[str, Any]) -> None:
        for key in ("head_dim", "num_key_value_heads", "eos_token_id", "bos_token_id", "pad_token_id"):
            config.pop(key, None)

    folder = variant(change)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0], "bos_token_id": 1}')
    shape = read_target(folder)
    assert (shape.head_dim, shape.kv_heads) == (shape.hidden // shape.heads, shape.heads)
    assert (shape.bos, shape.eos, shape.pad) == (1, (2, 0), None)


def test_the_language_part_of_a_model_with_other_inputs_is_read(variant):
    def nested(config: dict[str, Any]) -> None:
        inner = {**config, "model_type": "qwen3_vl_text"}
        config.clear()
        config.update(architectures=["Qwen3VLForConditionalGeneration"], text_config=inner, tie_word_embeddings=False)

    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.language_model.embed_tokens.weight"] = tensors.pop("model.embed_tokens.weight")
        tensors["model.visual.pos_embed.weight"] = torch.zeros(4, 4)

    shape = read_target(variant(nested, renamed))
    assert (shape.architecture, shape.model_type) == ("Qwen3VLForConditionalGeneration", "qwen3_vl_text")
    assert embedding_name(shape) == "model.language_model.embed_tokens.weight"
    assert embedding(shape).shape == (shape.vocab, shape.hidden)


def test_shards_are_read_through_their_index(variant):
    folder = variant()
    whole = read_target(folder)
    first, second = embedding(whole), lm_head(whole)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in halves.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    shape = read_target(folder)
    assert torch.equal(embedding(shape), first)
    assert torch.equal(lm_head(shape), second)

    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"should be in model-00002-of-00002\.safetensors, which is missing"):
        lm_head(read_target(folder))


def test_a_file_that_was_cut_off_or_is_none_is_refused(variant):
    folder = variant()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(UserError, match="reaches beyond the end of the file"):
        embedding(read_target(folder))
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="not a safetensors file"):
        embedding(read_target(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        embedding(read_target(folder))


def test_an_embedding_of_another_size_than_config_json_says_is_refused(variant):
    def padded(config: dict[str, Any]) -> None:
        config["vocab_size"] += 64

    with pytest.raises(UserError, match=r"which tensor is the embedding, \[576, 64\] by config.json"):
        embedding(read_target(variant(padded)))


def test_a_target_that_changes_its_states_before_the_head_is_refused(variant):
    with pytest.raises(UserError, match="changes its states before the head \\(dim_model_base"):
        read_target(variant(lambda content: content.update(dim_model_base=256)))


@pytest.mark.parametrize(
    ("config", "scale", "cap"),
    [
        ({"final_logit_softcapping": 30.0}, 1.0, 30.0),
        ({"final_logit_softcapping": -1}, 1.0, None),
        ({"logit_scale": 0.0625}, 0.0625, None),
        ({"logits_scaling": 8.0, "final_logit_softcapping": 5}, 0.125, 5.0),
    ],
)
def test_what_happens_between_head_and_softmax_is_read(variant, config, scale, cap):
    assert read_target(variant(lambda content: content.update(config))).logits == Logits(scale, cap)


def test_the_bias_of_a_head_is_read(variant):
    def biased(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.bias"] = torch.arange(tensors["lm_head.weight"].shape[0]).bfloat16()

    shape = read_target(variant(None, biased))
    bias = head_bias(shape)
    assert bias is not None
    assert torch.equal(bias, torch.arange(shape.vocab).bfloat16())
    assert head_bias(read_target(variant())) is None


def test_a_prediction_layer_holds_copies_that_are_not_the_models_own(variant):
    def predicting(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("embed_tokens.weight", "shared_head.head.weight", "lm_head.weight"):
            tensors[f"model.layers.6.{name}"] = torch.zeros(512, 64)
        tensors["mtp.0.embed_tokens.weight"] = torch.zeros(512, 64)

    shape = read_target(variant(None, predicting))
    assert embedding_name(shape) == "model.embed_tokens.weight"
    assert head_name(shape) == "lm_head.weight"


def test_rows_behind_the_vocabulary_are_padding(variant):
    def smaller(config: dict[str, Any]) -> None:
        config["vocab_size"] = 500

    whole, shape = read_target(variant()), read_target(variant(smaller))
    assert torch.equal(embedding(shape), embedding(whole)[:500])
    assert torch.equal(lm_head(shape), lm_head(whole)[:500])


def test_a_dtype_that_config_json_does_not_say_is_the_heads(variant):
    def silent(config: dict[str, Any]) -> None:
        del config["torch_dtype"]

    def wide(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].float()

    assert read_target(variant(silent)).dtype == "bfloat16"
    assert read_target(variant(silent, wide)).dtype == "float32"
    assert read_target(variant(lambda config: config.update(torch_dtype="float8_e4m3fn"))).dtype == "bfloat16"


def test_nothing_is_made_up_where_no_class_knows_it(variant):
    def unknown(*gone: str) -> Change:
        def change(config: dict[str, Any]) -> None:
            config["model_type"] = "of_its_own"
            for key in gone:
                del config[key]

        return change

    assert read_target(variant(unknown())).max_positions == 2048
    with pytest.raises(UserError, match="no rope_theta, and transformers has none for model_type: of_its_own"):
        read_target(variant(unknown("rope_theta")))
    with pytest.raises(UserError, match="no max_position_embeddings, and transformers has none"):
        read_target(variant(unknown("max_position_embeddings")))


def test_a_null_means_the_default_of_the_class_where_the_class_says_so(variant):
    def nulls(config: dict[str, Any]) -> None:
        del config["tie_word_embeddings"], config["rope_theta"]
        config.update(rope_parameters=None, rope_scaling=None, model_type="mistral", sliding_window=None)

    shape = read_target(variant(nulls))
    assert shape.rope == {"rope_theta": 1e4, "rope_scaling": None}
    assert [kind.window for kind in attention(shape)] == [None]


def test_a_file_that_transformers_does_not_take_is_refused_with_its_words(variant):
    def wrong(config: dict[str, Any]) -> None:
        del config["rope_theta"]
        config["num_attention_heads"] = 5

    with pytest.raises(UserError, match=r"transformers' class for model_type: llama rejects it: .*hidden size"):
        read_target(variant(wrong))


def test_the_width_of_a_latents_heads_is_that_of_their_values(variant):
    def latent(config: dict[str, Any]) -> None:
        config.update(kv_lora_rank=16, qk_rope_head_dim=8, head_dim=8, v_head_dim=32)

    shape = read_target(variant(latent))
    assert (shape.head_dim, shape.latent) == (32, True)


@pytest.mark.parametrize(
    ("scaling", "kept"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}, True),
        ({"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [4.0] * 6}, False),
        ({"rope_type": "proportional", "partial_rotary_factor": 0.25}, False),
    ],
)
def test_a_rope_that_turns_a_part_of_a_head_is_plain_in_the_draft(variant, scaling, kept):
    shape = read_target(variant(lambda config: config.update(rope_scaling=scaling, rope_theta=5e4)))
    assert shape.rope["rope_theta"] == 5e4
    assert (shape.rope["rope_scaling"] is not None) == kept


def test_what_is_no_model_directory_is_said_so(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_target(tmp_path)
    with pytest.raises(UserError, match="there is no directory"):
        read_target(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_target(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 8}')
    with pytest.raises(UserError, match="no num_hidden_layers"):
        read_target(tmp_path)


@pytest.mark.light
def test_a_hub_name_that_is_not_in_the_cache_says_how_to_get_it(tmp_path):
    code = "from specbatch.target import locate; locate('specbatch-tests/no-such-model')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert "not in the cache" in done.stderr
    assert "download it with `hf download specbatch-tests/no-such-model`" in done.stderr


def test_a_hub_name_is_found_in_the_cache(tiny_target, tmp_path):
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_target, repository / "snapshots" / commit)
    code = "from specbatch.target import read_target; print(read_target('org/tiny').path)"
    env = {"PATH": "", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert Path(done.stdout.strip()) == repository / "snapshots" / commit


def test_a_directory_is_located_as_it_is(tiny_target):
    assert locate(tiny_target) == tiny_target.resolve()


@pytest.mark.parametrize(
    ("layers", "want"), [(4, (0, 1, 2)), (5, (0, 1, 3)), (6, (0, 2, 4)), (30, (1, 14, 26)), (61, (1, 29, 57))]
)
def test_three_distinct_layers_below_the_last_are_chosen(variant, tmp_path, layers, want):
    folder = variant(lambda config: config.update(num_hidden_layers=layers))
    shape, config = read_target(folder), config_of(folder, tmp_path)
    assert algorithm_of(config, shape).contract.layers == want
    assert algorithm_of(config, shape).contract.widths == {"aux": 3 * shape.hidden, "last": shape.hidden}


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_target_too_shallow_for_three_layers_is_refused(variant, tmp_path, layers):
    folder = variant(lambda config: config.update(num_hidden_layers=layers))
    with pytest.raises(UserError, match=r"draft\.aux_layers: .* has only \d layers"):
        algorithm_of(config_of(folder, tmp_path), read_target(folder)).contract  # noqa: B018


def test_layers_that_are_named_are_taken(tiny_target, tmp_path):
    config = config_of(tiny_target, tmp_path, "--draft.aux_layers", "[0, 1, 4]")
    assert algorithm_of(config, read_target(tiny_target)).contract.layers == (0, 1, 4)


def test_the_fingerprint_tells_targets_apart(tiny_target, variant):
    def other(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][0, 0] += 1

    same = fingerprint(read_target(tiny_target))
    assert fingerprint(read_target(variant())) == same
    assert fingerprint(read_target(variant(None, other))) != same
    assert fingerprint(read_target(variant(lambda config: config.update(rope_theta=1.0)))) != same


def test_reading_a_target_loads_no_torch(tiny_target):
    code = (
        "import sys; from specbatch.target import read_target, fingerprint; "
        f"fingerprint(read_target({str(tiny_target)!r})); "
        "print([m for m in ('torch', 'transformers', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
