import json
import shlex
import struct
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from safetensors.torch import load_file

from specbatch.config import Config, Data, Run, Target, dump_config
from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.drafts.eagle3.files import Eagle3Files
from specbatch.drafts.eagle3.hf_config import hf_config
from specbatch.drafts.eagle3.memory import Shape
from specbatch.drafts.eagle3.published import shapes
from specbatch.errors import RunError, UserError
from specbatch.export import export
from specbatch.export.card import tell_measured
from specbatch.rundir import RunDir
from specbatch.snapshot.storage import HDF5Writer
from specbatch.target import read_target

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

REFERENCE = {
    *("fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"),
    *(f"layers.0.{norm}.weight" for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm")),
    *(f"layers.0.self_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
}
"""The names of published EAGLE-3 checkpoints."""


def shape_of(target, intermediate):
    return Shape(
        target.hidden, intermediate, target.heads, target.kv_heads, target.head_dim, target.vocab, target.vocab
    )


def files_of(target):
    return Eagle3Files(Eagle3Draft(), target, shape_of(target, 96), (0, 2, 4))


def random_draft(target, vocab, intermediate=96, seed=0):
    """Return a draft's tensors in a snapshot: float32 parameters, and the ids of a pruned vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    wanted = shapes(shape_of(target, intermediate), vocab)
    draft = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in wanted.items()}
    draft["draft_ids"] = torch.randperm(target.vocab, generator=generator)[:vocab].sort().values
    return draft


def save(run_dir, step, draft):
    state = {**draft, "optimizer": {f"state.{n}.exp_avg": torch.full(t.shape, float("nan")) for n, t in draft.items()}}
    writer = HDF5Writer(run_dir.snapshots / f"step-{step}", step=step)
    dcp.save({**state, "train_state": {"step": step}}, storage_writer=writer, no_dist=True)


def make_run(folder, target_path, vocab=100, steps=(3,), intermediate=96, aux_layers=None, norms=False, **changes):
    """A run directory with snapshots of random drafts, with the norms of EAGLE-3.1 or without."""
    if norms:
        changes = {f"fc_norm.{number}.weight": torch.full((64,), number + 0.5) for number in range(3)} | changes
    run_dir = RunDir(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(
        run=Run(dir=str(folder), name="nightly"),
        target=Target(path=str(target_path)),
        data=Data(train=["conversations.jsonl"]),
        draft=Eagle3Draft(
            vocab_size=vocab,
            intermediate_size=intermediate,
            aux_layers=aux_layers,
            fc_norm=norms,
            norm_output=norms,
        ),
    )
    run_dir.config.write_text(dump_config(config))
    target = read_target(target_path)
    for step in steps:
        save(run_dir, step, {**random_draft(target, vocab or target.vocab, intermediate, seed=step), **changes})
    return run_dir


@pytest.fixture
def run(tmp_path, tiny_target):
    return make_run(tmp_path / "run", tiny_target)


def nulls(value):
    if isinstance(value, dict):
        return any(nulls(inner) for inner in value.values())
    return any(map(nulls, value)) if isinstance(value, list) else value is None


def test_names_are_those_of_published_checkpoints_and_values_the_snapshots(run, tiny_target):
    tensors = load_file(export(run) / "model.safetensors")
    assert set(tensors) == REFERENCE
    draft = random_draft(read_target(tiny_target), 100, seed=3)
    for name in REFERENCE - {"d2t", "t2d"}:
        assert torch.equal(tensors[name], draft[name].bfloat16()), name
    assert torch.equal(torch.arange(100) + tensors["d2t"], draft["draft_ids"])
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].dtype == torch.bool
    assert torch.equal(tensors["t2d"].nonzero().flatten(), draft["draft_ids"])


def test_a_whole_vocabulary_has_no_map(tmp_path, tiny_target):
    folder = export(make_run(tmp_path, tiny_target, vocab=None))
    assert set(load_file(folder / "model.safetensors")) == REFERENCE - {"d2t", "t2d"}
    assert json.loads((folder / "config.json").read_text())["draft_vocab_size"] == 512


def test_only_a_draft_with_the_norms_of_eagle_3_1_says_so_and_has_them(tmp_path, tiny_target):
    """Some trainers read norm_output with another meaning; to every engine, what is not said is false."""
    plain, normed = (
        export(make_run(tmp_path / name, tiny_target, norms=name == "normed")) for name in ("plain", "normed")
    )
    config = json.loads((plain / "config.json").read_text())
    assert not config.keys() & {"norm_output", "fc_norm", "norm_before_fc"}
    assert config["norm_before_residual"] is False, "which vLLM takes for true where it is not said"
    config = json.loads((normed / "config.json").read_text())
    assert (config["norm_output"], config["fc_norm"]) == (True, True)
    tensors = load_file(normed / "model.safetensors")
    assert set(tensors) == REFERENCE | {f"fc_norm.{number}.weight" for number in range(3)}
    assert tensors["fc_norm.2.weight"].tolist() == [2.5] * 64


def test_anybody_may_read_the_files(run):
    folder = export(run)
    assert folder == run.export
    assert folder.stat().st_mode & 0o777 == 0o755
    files = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert files == dict.fromkeys(["config.json", "model.safetensors", "specbatch.json", "README.md"], 0o644)
    assert {path.name for path in run.root.iterdir()} == {"config.yaml", "snapshots", "export"}
    header = struct.unpack("<Q", (folder / "model.safetensors").read_bytes()[:8])[0]
    assert json.loads((folder / "model.safetensors").read_bytes()[8 : 8 + header])["__metadata__"] == {"format": "pt"}


def test_the_best_snapshot_is_the_one_that_evaluations_found_best(tmp_path, tiny_target):
    run = make_run(tmp_path / "run", tiny_target, steps=(3, 6, 9))
    with pytest.raises(UserError, match="no evaluation was made after the steps of its snapshots"):
        export(run, best=True)
    lengths = {3: 1.5, 6: 1.8, 8: 2.0, 9: 1.7}
    lines = [
        {"step": step, "evaluation": {"acceptance_length": x, "loss": 1.0, "accuracy": [0.5]}}
        for step, x in lengths.items()
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = export(run, best=True)
    assert json.loads((folder / "specbatch.json").read_text())["step"] == 6
    assert json.loads((export(run) / "specbatch.json").read_text())["step"] == 9


def test_a_trained_embedding_is_exported_and_the_configuration_makes_engines_keep_it(tmp_path, tiny_target):
    embedding = torch.randn(512, 64)
    folder = export(make_run(tmp_path, tiny_target, **{"embed_tokens.weight": embedding}))
    assert torch.equal(load_file(folder / "model.safetensors")["embed_tokens.weight"], embedding.bfloat16())
    config = json.loads((folder / "config.json").read_text())
    assert not nulls(config)
    # SGLang takes the target's embedding where the first of these is the draft's own width.
    assert (config["target_hidden_size"], config["num_aux_hidden_states"], config["hidden_size"]) == (192, 1, 64)
    assert "speculators_config" not in config
    assert "speculators" not in (folder / "README.md").read_text()
    wrong = make_run(tmp_path / "wrong", tiny_target, **{"embed_tokens.weight": embedding[1:]})
    with pytest.raises(RunError, match=r"embed_tokens.weight is \[511, 64\], not \[512, 64\]"):
        export(wrong)


def test_the_configuration_speaks_to_each_engine_in_its_own_numbers(tmp_path, tiny_target):
    folder = export(make_run(tmp_path, tiny_target, aux_layers=[0, 2, 4]))
    config = json.loads((folder / "config.json").read_text())
    assert not nulls(config)
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 4], "SGLang: outputs of these layers"
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 5], "vLLM, speculators: after so many layers"
    assert config["tie_word_embeddings"] is False
    assert (config["vocab_size"], config["draft_vocab_size"], config["target_hidden_size"]) == (512, 100, 64)
    shared = {key: value for key, value in config["transformer_layer_config"].items() if key != "architectures"}
    assert shared == {key: config[key] for key in shared}, "both halves say the same"


def test_the_draft_of_a_tied_target_is_not_tied(tmp_path, tiny_target):
    copy = tmp_path / "tied"
    copy.mkdir()
    for path in tiny_target.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text()) | {"tie_word_embeddings": True}
    (copy / "config.json").write_text(json.dumps(config))
    folder = export(make_run(tmp_path / "run", copy))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert load_file(folder / "model.safetensors")["lm_head.weight"].shape == (100, 64)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("scaling", [None, YARN, {**LLAMA3, "original_max_position_embeddings": 1024}])
def test_rope_reads_the_same_in_both_schemas(tiny_target, scaling):
    target = replace(read_target(tiny_target), rope={"rope_theta": 50000.0, "rope_scaling": scaling})
    shape = shape_of(target, 96)
    config = hf_config(target, shape, target_name="t", aux_layers=(0, 1, 2), draft_vocab=10, draft_tokens=3)
    assert not nulls(config)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    old = {"rope_type": "default", **config.get("rope_scaling", {})}
    assert old == {key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
    assert ("rope_scaling" in config) == (scaling is not None)


@pytest.mark.light
def test_transformers_reads_rope_and_shape_as_they_were_trained(tmp_path, tiny_target):
    from transformers import LlamaConfig

    target = replace(read_target(tiny_target), rope={"rope_theta": 50000.0, "rope_scaling": YARN})
    shape = shape_of(target, 96)
    config = hf_config(target, shape, target_name="t", aux_layers=(0, 1, 2), draft_vocab=10, draft_tokens=3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = LlamaConfig.from_pretrained(tmp_path)
    assert read.rope_parameters["rope_theta"] == 50000.0
    assert read.rope_parameters["rope_type"] == "yarn"
    assert read.rope_parameters["original_max_position_embeddings"] == 512
    assert (read.hidden_size, read.head_dim, read.num_key_value_heads, read.tie_word_embeddings) == (64, 16, 2, False)


def vllm_name(name):
    """Return the parameter that a tensor becomes in vLLM's `llama_eagle3`; None for skipped ones."""
    if "t2d" in name:
        return None
    if "d2t" in name:
        return "draft_id_to_target_id"
    name = name.replace("midlayer.", "layers.0.")
    if "lm_head" not in name:
        name = "model." + name
    for part, whole in {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}.items():
        name = name.replace(f".{part}", f".{whole}")
    return name.replace(".gate_proj", ".gate_up_proj").replace(".up_proj", ".gate_up_proj")


@pytest.mark.parametrize("norms", [False, True])
def test_vllms_weight_map_covers_every_tensor(tmp_path, tiny_target, norms):
    run = make_run(tmp_path / "run", tiny_target, norms=norms)
    layer = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
    layer |= {"input_layernorm", "hidden_norm", "post_attention_layernorm"}
    parameters = {f"model.layers.0.{name}.weight" for name in layer}
    parameters |= {"model.fc.weight", "model.norm.weight", "lm_head.weight", "draft_id_to_target_id"}
    parameters |= {f"model.fc_norm.{number}.weight" for number in range(3) if norms}
    names = load_file(export(run) / "model.safetensors").keys()
    assert {vllm_name(name) for name in names} == parameters | {None}


def test_the_newest_readable_snapshot_is_taken_and_a_damaged_one_named(tmp_path, tiny_target, caplog):
    run = make_run(tmp_path, tiny_target, steps=(3, 6))
    assert json.loads((export(run) / "specbatch.json").read_text())["step"] == 6
    file = run.snapshots / "step-6" / "rank-0.h5"
    bits = random_draft(read_target(tiny_target), 100, seed=6)["fc.weight"].numpy().tobytes()
    file.write_bytes(file.read_bytes().replace(bits, bits[:-1] + bytes([bits[-1] ^ 1])))
    assert json.loads((export(run) / "specbatch.json").read_text())["step"] == 3
    assert "step-6/rank-0.h5: tensor fc.weight is not what was written" in caplog.text
    assert json.loads((export(run, step=3) / "specbatch.json").read_text())["step"] == 3
    with pytest.raises(RunError, match=r"tensor fc\.weight"):
        export(run, step=6)
    assert load_file(run.export / "model.safetensors").keys() == REFERENCE, "the export before is still there"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fc.weight": torch.ones(64, 64)}, r"tensor fc\.weight is \[64, 64\], not \[64, 192\]"),
        ({"norm.weight": torch.full((64,), 3.4e38)}, r"norm\.weight has 64 values that are not finite in bfloat16"),
        ({"norm.weight": torch.tensor([float("nan")] + [1.0] * 63)}, r"norm\.weight has 1 values"),
        ({"layers.0.self_attn.q_proj.bias": torch.ones(64)}, r"q_proj\.bias that no engine loads"),
        ({"draft_ids": torch.arange(100).flip(0)}, "not ascending ids"),
        ({"draft_ids": torch.arange(100) + 413}, "not ascending ids of the target's 512 tokens"),
        ({"draft_ids": torch.arange(100).clamp(max=98)}, "each once"),
        ({"draft_ids": torch.arange(100).int()}, r"torch\.int32"),
        ({"draft_ids": torch.arange(99)}, r"lm_head\.weight is \[100, 64\], not \[99, 64\]"),
    ],
)
def test_a_draft_that_no_engine_would_serve_rightly_is_refused_by_the_tensors_name(tmp_path, tiny_target, change, why):
    run = make_run(tmp_path, tiny_target, **change)
    with pytest.raises(RunError, match=why):
        export(run)
    assert not run.export.exists()


def test_a_missing_tensor_is_named(tmp_path, tiny_target):
    target = read_target(tiny_target)
    draft = random_draft(target, 100)
    del draft["layers.0.mlp.down_proj.weight"]
    with pytest.raises(RunError, match=r"step 3: the draft has no tensor layers\.0\.mlp\.down_proj\.weight"):
        files_of(target).checkpoint(draft, "step 3")


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 511), min_size=1, max_size=511))
def test_the_maps_between_vocabularies_are_each_others_inverse(tiny_target, ids):
    target = read_target(tiny_target)
    draft = random_draft(target, len(ids)) | {"draft_ids": torch.tensor(sorted(ids))}
    tensors = files_of(target).checkpoint(draft, "here")
    back = torch.arange(len(ids)) + tensors["d2t"]
    assert back.tolist() == tensors["t2d"].nonzero().flatten().tolist() == sorted(ids)


def test_what_is_not_an_export_is_never_replaced(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a draft that specbatch wrote"):
        export(run, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    empty = tmp_path / 'it\'s a "draft"'
    empty.mkdir()
    assert export(run, out=empty) == empty
    assert export(run, out=empty) == empty, "an export is replaced by the next"


def test_without_a_snapshot_the_user_is_told(tmp_path, tiny_target):
    run = make_run(tmp_path, tiny_target, steps=())
    with pytest.raises(UserError, match="no snapshot yet"):
        export(run)
    save(run, 3, random_draft(read_target(tiny_target), 100))
    with pytest.raises(UserError, match=r"no snapshot of step 4; it has \[3\]"):
        export(run, step=4)


def test_the_card_tells_what_was_measured_on_the_way_and_at_the_end(run):
    evaluation = {"acceptance_length": 1.5, "loss": 2.0, "accuracy": [0.5, None]}
    run.metrics.write_text(json.dumps({"step": 3, "accuracy": [0.5], "evaluation": evaluation}) + "\n")
    folder = export(run)
    card = (folder / "README.md").read_text()
    assert "from stored hidden states: loss 2.000, accuracy 0.50 -, acceptance length 1.50." in card
    measured = {"acceptance_length": 1.893, "draft_tokens": 3, "prompts": 40, "identical": 39, "dtype": "float32"}
    tell_measured(folder, measured | {"sglang": "0.5.23", "seconds": 3.0})
    told = (folder / "README.md").read_text()
    assert "**Acceptance length 1.89** of at most 4" in told
    assert "identical to plain decoding on 39 of them" in told
    assert [line for line in card.splitlines() if line not in told.splitlines()] == []
    assert (folder / "README.md").stat().st_mode & 0o777 == 0o644


def test_a_draft_of_others_is_measured_and_left_alone(tmp_path):
    tell_measured(tmp_path, {"acceptance_length": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_the_card_says_where_the_draft_comes_from_and_how_to_serve_it(run, tiny_target):
    lines = [{"step": 2, "accuracy": [0.1]}, {"step": 3, "accuracy": [0.75, None]}, {"step": 4, "accuracy": [0.9]}]
    run.metrics.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5, "acc')
    card = (export(run) / "README.md").read_text()
    assert "run `nightly`, optimizer step 3" in card
    assert "0.750, -." in card
    command = card[card.index("python -m sglang") : card.index("vllm serve")].replace("\\\n", " ")
    assert shlex.split(command)[4] == str(tiny_target)
    assert "Trainers that call the layer `midlayer`" in card
