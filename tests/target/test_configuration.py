"""Targets as their config.json describes them, right and wrong: each file here is a real one, changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from specbatch.errors import UserError
from specbatch.target import Logits, attention, embedding, embedding_name, fingerprint, read_target


def test_the_shape_of_a_real_target(smollm):
    shape = read_target(smollm)
    assert (shape.architecture, shape.model_type, shape.dtype) == ("LlamaForCausalLM", "llama", "bfloat16")
    assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (576, 30, 9, 3, 64)
    assert (shape.intermediate, shape.vocab, shape.max_positions, shape.rms_norm_eps) == (1536, 49152, 8192, 1e-5)
    assert (shape.tied, shape.bos, shape.eos, shape.pad) == (True, 1, (2,), 2)
    assert shape.rope == {"rope_theta": 100000.0, "rope_scaling": None}


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


def test_a_dtype_that_config_json_does_not_say_is_the_heads(variant):
    def silent(config: dict[str, Any]) -> None:
        del config["torch_dtype"]

    def wide(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].float()

    assert read_target(variant(silent)).dtype == "bfloat16"
    assert read_target(variant(silent, wide)).dtype == "float32"
    assert read_target(variant(lambda config: config.update(torch_dtype="float8_e4m3fn"))).dtype == "bfloat16"


def test_nothing_is_made_up_where_no_class_knows_it(variant):
    def unknown(*gone: str) -> Callable[[dict[str, Any]], None]:
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
