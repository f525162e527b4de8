"""Configurations that can't work are refused before anything starts, with both fields and a value that works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specbatch.checks import check, check_plan
from specbatch.checks.machine import visible_gpus
from specbatch.checks.run_dir import check_snapshot
from specbatch.config import Config, load_config
from specbatch.config.rules import Bytes
from specbatch.corpus import corpus_of, make_plan, prepare, try_first_rows
from specbatch.drafts.base import algorithm_of
from specbatch.errors import UserError
from specbatch.inference.arguments import BREAKS_CAPTURE, SHARES_ROWS, sglang_argument_names
from specbatch.room import check_first, check_store
from specbatch.rundir import RunDir
from specbatch.snapshot.manifest import FORMAT, MANIFEST, SnapshotManifest, snapshot_path, write_manifest
from specbatch.target import read_target
from specbatch.training.preflight import RESERVE_BYTES

Load = Callable[..., Config]


@pytest.fixture
def load(tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """A configuration of the tiny target (4 heads, 2 key heads, 6 layers, 2048 positions) on a machine without GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def make(*overrides: str, target: Path = tiny_target) -> Config:
        path = tmp_path / "a.yaml"
        path.write_text(
            f"run: {{dir: '{tmp_path}/run'}}\ntarget: {{path: '{target}'}}\n"
            "data: {train: [train.jsonl], heldout: [heldout.jsonl], max_tokens: 256, cache_dir: cache}\n"
            "draft: {vocab_size: 256}\ntraining: {tokens_per_pack: 512, warmup_steps: 0}\n"
            "store: {bytes_per_rank: 16MiB}\n"
        )
        return load_config(path, overrides)

    return make


@pytest.fixture
def changed(tiny_target: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny target with another config.json, and another tokenizer.json."""

    def make(tokenizer: Callable[[dict[str, Any]], None] | None = None, **config: Any) -> Path:
        folder = tmp_path / f"target-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_target, folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **config}))
        if tokenizer:
            content = json.loads((folder / "tokenizer.json").read_text())
            tokenizer(content)
            (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    return make


def refused(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        check(config)
    return str(caught.value)


def test_what_works_is_not_complained_about(load):
    assert check(load()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "--inference.tensor_parallel 3",
            "inference.tensor_parallel: 3 does not divide the target's 4 attention heads; try 2 or 4",
        ),
        (
            "--inference.tensor_parallel 8",
            "inference.tensor_parallel: 8 does not divide the target's 4 attention heads; try 4",
        ),
        (
            "--training.ranks 3",
            "training.packs_per_step: 8 can't be shared evenly by training.ranks: 3; try 6 or 9",
        ),
        (
            "--training.ranks 16",
            "training.packs_per_step: 8 can't be shared evenly by training.ranks: 16; try 16",
        ),
        (
            "--data.max_tokens 600",
            "training.tokens_per_pack: 512 is less than data.max_tokens: 600, so packs could not hold the longest "
            "samples; set training.tokens_per_pack: 600 or data.max_tokens: 512",
        ),
        (
            "--data.max_tokens 4096 --training.tokens_per_pack 4096",
            "data.max_tokens: 4096 is more than the target's 2048 positions; set data.max_tokens: 2048",
        ),
        (
            "--inference.sglang.context_length 200",
            "inference.sglang.context_length: 200 is too little for data.max_tokens: 256, since SGLang keeps 6 "
            "positions for itself; set at least 261, or remove it",
        ),
        (
            "--inference.sglang.context_length 4096",
            "inference.sglang.context_length: 4096 is more than the target's 2048 positions; set 2048, or remove it",
        ),
        (
            "--inference.sglang.max_total_tokens 100",
            "inference.sglang.max_total_tokens: 100 is less than data.max_tokens: 256, so the longest samples could "
            "not be computed; set at least 256",
        ),
        (
            "--draft.aux_layers [1,2,5]",
            "draft.aux_layers: 5 can't be read: of the target's 6 layers the last that can be is 4, since SGLang does "
            "not provide the last layer's output; leave it out for a low, a middle and a high one",
        ),
        ("--draft.aux_layers [2,1,3]", "draft.aux_layers: [2, 1, 3]: eagle3 reads three distinct layers in ascending"),
        ("--draft.aux_layers [1,1,3]", "draft.aux_layers: [1, 1, 3]: eagle3 reads three distinct layers in ascending"),
        ("--draft.aux_layers [1,3]", "draft.aux_layers: [1, 3]: eagle3 reads three distinct layers in ascending"),
        (
            "--draft.vocab_size 513",
            "draft.vocab_size: 513 is more than the target's 512 tokens; set draft.vocab_size: null for all of them",
        ),
        (
            "--data.heldout []",
            "evaluate.prompts: 40 come from data.heldout, which is empty; name files there, or ",
        ),
        ("--data.heldout x.jsonl --data.train x.jsonl", "data.heldout: "),
        ("--store.protocol rdma", "store.devices: is empty, but store.protocol: rdma needs them; name them as "),
        ("--target.path org/no-such-model", "target.path: org/no-such-model is not a directory, and not in the cache "),
    ],
)
def test_what_does_not_fit_together_is_refused_with_a_value_that_would_do(load, overrides, message):
    assert refused(load(*overrides.split())).startswith(message)


@pytest.mark.parametrize(
    "overrides", ["--inference.tensor_parallel 4", "--data.max_tokens 2048 --training.tokens_per_pack 2048"]
)
def test_what_just_fits_is_accepted(load, overrides):
    check(load(*overrides.split()))


def test_key_heads_fewer_than_ranks_are_copied_and_others_must_divide(load, changed):
    assert check(load("--inference.tensor_parallel=4", target=changed(num_key_value_heads=1))) == []
    message = refused(load("--inference.tensor_parallel=2", target=changed(num_key_value_heads=3)))
    assert message == "inference.tensor_parallel: 2 does not divide the target's 3 key heads; try 1"


def test_every_argument_that_would_break_the_capture_is_refused_by_name(load):
    config = load()
    for name, what_to_do in BREAKS_CAPTURE.items():
        config.inference.sglang = {name: 1}
        assert refused(config) == f"inference.sglang.{name}: can't be set here: {what_to_do}"
    assert "without a draft" in refused(load("--inference.sglang.speculative_num_steps=3"))


def test_only_the_parallelism_that_takes_rows_from_rank_0_is_refused(load):
    config = load()
    for name, why in SHARES_ROWS.items():
        config.inference.sglang = {name: 2}
        assert refused(config) == f"inference.sglang.{name}: can't be set here: {why}: remove it"
    config.inference.sglang = {"ep_size": 2, "dcp_size": 2, "attn_dp_size": 1, "moe_a2a_backend": "none"}
    assert check(config) == []
    assert "its own requests" in refused(load("--inference.sglang.enable_dp_attention=true"))


def test_arguments_that_leave_the_capture_alone_pass(load):
    overrides = ["--inference.sglang.mem_fraction_static=0.8", "--inference.sglang.disable_overlap_schedule=true"]
    assert check(load(*overrides, "--inference.sglang.chunked_prefill_size=128")) == []


def test_chunks_are_refused_where_the_capture_must_be_deterministic(load):
    message = refused(load("--inference.deterministic", "--inference.sglang.chunked_prefill_size=128"))
    assert message.startswith("inference.sglang.chunked_prefill_size: can't be set here: where a prompt is cut would")
    assert message.endswith("or set inference.deterministic: false")


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("mem_fraction_statc", "has no such argument; did you mean mem_fraction_static?"),
        ("max-running-requests", "has no such argument; did you mean max_running_requests?"),
        ("tensor_parallel_sizes", "if you mean tensor_parallel_size: set inference.tensor_parallel instead"),
        ("zzqqxx", "has no such argument; see `python -m sglang.launch_server --help`"),
    ],
)
def test_an_argument_that_sglang_does_not_have_is_refused_with_the_nearest(load, name, end):
    message = refused(load(f"--inference.sglang.{name}=1"))
    assert message.startswith(f"inference.sglang.{name}: SGLang ")
    assert message.endswith(end)


def test_the_arguments_of_the_installed_sglang_are_known():
    names = sglang_argument_names()
    assert {"mem_fraction_static", "attention_backend", "quantization", "max_total_tokens", "load_format"} <= names
    assert {name for name in BREAKS_CAPTURE if "parallel_size" not in name and name not in ("tp", "dp")} <= names
    assert set(SHARES_ROWS) <= names


def test_tokens_without_a_row_in_the_embedding_are_refused_by_name(load, changed):
    def added(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 512, "content": "<|tool|>"})

    message = refused(load(target=changed(added)))
    assert "has 1 tokens that its embedding of 512 rows (vocab_size) has no row for: <|tool|> (512)" in message


def test_rows_of_the_embedding_without_a_token_are_none_for_the_draft(load, changed):
    def fewer(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        for token in [token for token, i in vocabulary.items() if i >= 500]:
            del vocabulary[token]

    target = changed(fewer)
    assert refused(load("--draft.vocab_size=512", target=target)).startswith(
        "draft.vocab_size: 512 is more than the target's 500 tokens"
    )
    assert check(load("--draft.vocab_size=500", target=target)) == []


def test_a_head_that_sglang_would_not_use_is_warned_of(load, changed):
    target = changed(tie_word_embeddings=True)
    tensors = load_file(target / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, target / "model.safetensors")
    (warning,) = check(load(target=target))
    assert "stores lm_head.weight, which differs from its embedding" in warning
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, target / "model.safetensors")
    assert check(load(target=target)) == []


def test_a_float32_target_is_warned_of_where_sglang_would_compute_in_float16(load, changed):
    target = changed(torch_dtype="float32", dtype="float32")
    (warning,) = check(load(target=target))
    assert warning.startswith("target.dtype: auto: the checkpoint is float32, which SGLang computes in float16")
    assert check(load("--target.dtype=float32", target=target)) == []


def test_a_target_with_code_of_its_own_is_warned_of_until_it_is_trusted(load, changed):
    target = changed(auto_map={"AutoConfig": "configuration_tiny.TinyConfig"})
    (warning,) = check(load(target=target))
    assert warning.startswith("target.trust_remote_code: false: ")
    assert check(load("--target.trust_remote_code", target=target)) == []


def test_a_run_that_has_begun_is_not_begun_again(load, tmp_path):
    config = load()
    RunDir(tmp_path / "run").make()
    (tmp_path / "run" / "config.yaml").write_text("")
    assert check(config) == []
    (tmp_path / "run" / "attempts" / "1").mkdir(parents=True)
    root = tmp_path / "run"
    assert refused(config) == (
        f"run.dir: {root} exists already as a run; continue it with `specbatch resume {root}`, or give another run.dir"
    )


def test_a_directory_that_specbatch_has_not_made_is_no_run_directory(load, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    assert check(load()) == []
    (tmp_path / "run" / "cache" / "corpus").mkdir(parents=True)
    assert check(load(f"--data.cache_dir={tmp_path / 'run' / 'cache' / 'corpus'}")) == []
    (tmp_path / "run" / "cache" / "corpus").rmdir()
    (tmp_path / "run" / "cache").rmdir()
    for name in ("config.yaml", "notes.txt"):
        (tmp_path / "run" / name).write_text("mine")
        assert refused(load()).startswith(
            f"run.dir: {tmp_path / 'run'} has files that do not belong to a run (config.yaml"
        )
    monkeypatch.chdir(tmp_path)
    assert "has files that do not belong to a run (" in refused(load("--run.dir=."))
    assert check(load(), new_run=False) == []


def test_a_run_directory_that_is_a_file_is_refused(load, tmp_path):
    (tmp_path / "run").write_text("")
    assert refused(load()) == f"run.dir: {tmp_path / 'run'} is a file; give another path"


def test_more_gpus_than_there_are_is_refused_and_the_count_is_of_those_that_may_be_used(load, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,7")
    assert visible_gpus() == 3
    assert check(load("--training.ranks=2")) == []
    assert refused(load("--training.ranks=2", "--inference.engines=2")) == (
        "training.ranks: 2 and inference.engines: 2 of inference.tensor_parallel: 1 need 4 GPUs, but this machine has "
        "3; try training.ranks: 2 and inference.engines: 1"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == 0


def test_memory_that_may_not_do_is_warned_of_before_the_corpus_is_known(load):
    (warning,) = check(load("--training.packs_per_step=64"))
    assert warning.startswith("store.bytes_per_rank: 16MiB of training.ranks: 1 hold 13.6 MiB, and a full step ")
    assert "is up to 16.0 MiB" in warning
    (warning,) = check(load("--store.bytes_per_rank=100TiB"))
    assert "are more than this machine's memory of" in warning


def test_a_warm_up_that_never_ends_is_warned_of(load):
    (warning,) = check(load("--training.max_steps=20", "--training.warmup_steps=20"))
    assert warning.startswith("training.warmup_steps: 20: the run has only 20 steps, so it never reaches ")
    assert warning.endswith("; try 2")


def test_evaluations_need_held_out_data_and_should_meet_snapshots(load):
    message = refused(load("--training.evaluate_interval_steps=10", "--data.heldout=[]", "--evaluate.prompts=0"))
    assert message.startswith("training.evaluate_interval_steps: 10: evaluations use data.heldout, which is empty")
    assert check(load("--training.evaluate_interval_steps=50", "--snapshot.interval=100")) == []
    assert check(load("--training.evaluate_interval_steps=30", "--snapshot.interval=10min")) == []
    (warning,) = check(load("--training.evaluate_interval_steps=30", "--snapshot.interval=100"))
    assert "snapshot.interval: 100 seldom meet" in warning


def test_held_out_data_that_are_training_data_by_another_way_are_refused(load, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "train.jsonl").write_text("")
    (tmp_path / "heldout.jsonl").symlink_to(tmp_path / "all" / "train.jsonl")
    for train in ("all", "all/train.jsonl", "./all/../all/train.jsonl"):
        message = refused(load(f"--data.train={tmp_path / train}"))
        assert message.startswith(f"data.heldout: {tmp_path / 'heldout.jsonl'} is in data.train, too")
    (tmp_path / "all" / ".part").mkdir()
    (tmp_path / "all" / ".part" / "kept.jsonl").write_text("")
    apart = load(f"--data.train={tmp_path / 'all'}", f"--data.heldout={tmp_path / 'all' / '.part' / 'kept.jsonl'}")
    assert check(apart) == []


def test_held_out_packs_fit_into_the_store_beside_any_step(load, tmp_path):
    for name in ("train", "heldout"):
        rows = [{"text": f"{name} {i} the licence of the work, and nothing else " * 40} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["--data.loss_on=all", "--training.packs_per_step=8", "--training.warmup_steps=0"]
    config = load(*common, "--training.evaluate_interval_steps=50")
    corpus = corpus_of(prepare(config))
    algorithm = algorithm_of(config, read_target(config.target.path))
    plan = make_plan(config, corpus)
    size = sum(algorithm.contract.bytes(corpus.sample(i).loss_mask) for pack in plan.heldout for i in pack.samples)
    config.store.bytes_per_rank = Bytes(int(size / 0.85))
    with pytest.raises(
        UserError, match=r"training\.evaluate_packs: 16 take .* besides any step, and step 1 takes"
    ) as caught:
        check_plan(config, plan, corpus, algorithm)
    config.store.bytes_per_rank = Bytes.parse(str(caught.value).split("set store.bytes_per_rank: ")[1].split(",")[0])
    check_plan(config, plan, corpus, algorithm)


def test_what_a_sweep_cannot_measure_is_refused_and_what_it_measures_in_vain_is_warned_of(load, tmp_path):
    message = refused(load("--evaluate.sets.gsm8k=absent.jsonl"))
    assert message.endswith("absent.jsonl: no such file")
    message = refused(load("--evaluate.sweep.batch_sizes=[1,64]", "--inference.sglang.max_running_requests=32"))
    assert message.startswith(
        "evaluate.sweep.batch_sizes: 64: the engine decodes inference.sglang.max_running_requests"
    )
    (warning,) = check(load("--evaluate.draft_tokens=9"))
    assert warning.startswith("evaluate.draft_tokens: 9: the draft is trained to propose 7 at a time")
    assert check(load("--evaluate.draft_tokens=9", "--evaluate.sets.gsm8k=absent.jsonl", "--evaluate.prompts=0")) == []


def test_held_out_data_without_answers_evaluate_nothing(load, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "the licence of the work " * 40}))
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Why?"}]}))
    config = load("--training.evaluate_interval_steps=50", "--data.max_bad_fraction=1")
    corpus = corpus_of(prepare(config))
    algorithm = algorithm_of(config, read_target(config.target.path))
    with pytest.raises(UserError, match=r"data\.heldout: no sample can be used for evaluation"):
        check_plan(config, make_plan(config, corpus), corpus, algorithm)


def test_snapshots_of_another_draft_are_refused_before_anything_starts(load, tmp_path):
    config = load("--draft.ttt_steps=3")
    algorithm = algorithm_of(config, read_target(config.target.path))
    for step, facts in ((1, {"algorithm": "dflash"}), (2, algorithm.facts())):
        snapshot_path(tmp_path, step).mkdir()
        write_manifest(
            snapshot_path(tmp_path, step), SnapshotManifest(FORMAT, "0", step, 1, {"draft": facts}, {}, {}, {}, {})
        )
    check_snapshot(tmp_path, algorithm)
    config = load("--draft.ttt_steps=4")
    with pytest.raises(UserError, match=r"step-2 belongs to another training: draft.ttt_steps was 3 and is 4"):
        check_snapshot(tmp_path, algorithm_of(config, read_target(config.target.path)))
    (snapshot_path(tmp_path, 2) / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"draft.algorithm: eagle3 can't continue from .*step-1, .* draft of dflash"):
        check_snapshot(tmp_path, algorithm)


def test_once_the_corpus_is_known_the_largest_step_must_fit_to_the_byte(load, tmp_path):
    rows = [{"text": f"{i} the licence of the work, and nothing else " * 40} for i in range(90)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["--data.heldout=[]", "--evaluate.prompts=0", "--data.loss_on=all", "--training.tokens_per_pack=256"]
    config = load(*common, "--training.packs_per_step=64", "--training.warmup_steps=5")
    corpus = corpus_of(prepare(config))
    algorithm = algorithm_of(config, read_target(config.target.path))
    plan = make_plan(config, corpus)
    assert int(corpus.lengths.min()) > 200
    (warning,) = check_plan(config, plan, corpus, algorithm)
    assert warning.startswith("training.warmup_steps: 5: the run has only 2 steps")

    needed = sum(algorithm.contract.bytes(corpus.sample(i).loss_mask) for pack in plan.packs(1) for i in pack.samples)
    config = load(*common, "--training.packs_per_step=90", "--training.ranks=1", "--store.bytes_per_rank=16MiB")
    plan = make_plan(config, corpus)
    whole = sum(algorithm.contract.bytes(corpus.sample(i).loss_mask) for i in range(len(corpus)))
    assert needed < 0.85 * (16 << 20) < 1.5 * whole
    config.store.bytes_per_rank = Bytes(int(whole / 0.85) + 2)
    check_store(config, plan, corpus, algorithm)
    config.store.bytes_per_rank = Bytes(int(whole / 0.85) - 2)
    with pytest.raises(
        UserError, match=r"store\.bytes_per_rank: .* of training\.ranks: 1 hold .*step 1 take .*; set"
    ) as caught:
        check_store(config, plan, corpus, algorithm)
    config.store.bytes_per_rank = Bytes.parse(str(caught.value).split("set store.bytes_per_rank: ")[1].split(",")[0])
    check_store(config, plan, corpus, algorithm)


def test_once_the_corpus_is_known_the_largest_object_must_fit_into_one_rank(load, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "the licence of the work " * 40}))
    config = load("--data.heldout=[]", "--evaluate.prompts=0", "--data.loss_on=all", "--training.ranks=8")
    corpus = corpus_of(prepare(config))
    algorithm = algorithm_of(config, read_target(config.target.path))
    check_store(config, make_plan(config, corpus), corpus, algorithm)
    config.store.bytes_per_rank = Bytes(90_000)
    with pytest.raises(UserError, match=r"can't hold objects of more than .* but a sample of \d+ tokens needs one of"):
        check_store(config, make_plan(config, corpus), corpus, algorithm)


def test_a_store_smaller_than_a_step_is_refused_once_the_first_rows_are_known(load, tmp_path):
    def rows(count: int) -> str:
        words = " ".join(f"word{i}" for i in range(30))
        row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": words}]}
        return (json.dumps(row) + "\n") * count

    def tried(config: Config) -> None:
        assert try_first_rows(config, lambda corpus, whole: check_first(config, corpus, whole)).warnings == []

    # Each sample has about 200 tokens of 512 bytes: 16 MiB hold 140.
    (tmp_path / "train.jsonl").write_text(rows(150))
    small = load("--data.heldout=[]", "--evaluate.prompts=0", "--training.packs_per_step=60")
    tried(small)
    large = load("--data.heldout=[]", "--evaluate.prompts=0", "--training.packs_per_step=120")
    for count in (300, 2000):
        (tmp_path / "train.jsonl").write_text(rows(count))
        tried(small)
        with pytest.raises(UserError, match=r"store\.bytes_per_rank: 16MiB of training\.ranks: 1 hold .* step 1"):
            tried(large)


def test_ranks_that_train_packs_together_divide_ranks_and_packs(load) -> None:
    with pytest.raises(UserError, match=r"training\.context_parallel: 2 does not divide training\.ranks: 3"):
        check(load("--training.ranks=3", "--training.context_parallel=2", "--training.packs_per_step=6"))
    with pytest.raises(UserError, match=r"training\.packs_per_step: 3 .* train a pack together; try 2 or 4"):
        check(load("--training.ranks=4", "--training.context_parallel=2", "--training.packs_per_step=3"))
    check(load("--training.ranks=4", "--training.context_parallel=4", "--training.packs_per_step=3"))


def test_a_gpu_that_is_too_small_is_told_with_both_numbers_and_a_remedy(load) -> None:
    check(load("--training.gpu_memory=80GiB"))
    with pytest.raises(UserError, match=r"training\.gpu_memory: .* needs .* training\.recompute: all"):
        check(load("--training.gpu_memory=1GiB"))


def test_a_gpu_has_room_for_all_that_is_trained(load) -> None:
    """An embedding of its own included; a head that is not trained needs less."""
    needed = sum(algorithm_of(load(), read_target(load().target.path)).memory().values())
    room = f"--training.gpu_memory={needed + RESERVE_BYTES}"
    check(load(room))
    with pytest.raises(UserError, match=r"training\.gpu_memory"):
        check(load(room, "--draft.train_embedding=true"))
    check(load(f"--training.gpu_memory={needed + RESERVE_BYTES - 1000}", "--draft.train_head=false"))
