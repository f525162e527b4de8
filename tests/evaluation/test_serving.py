from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specbatch.cli import main
from specbatch.config import dump_config, load_config
from specbatch.errors import UserError
from specbatch.evaluation import serving
from specbatch.evaluation.engines import Subject, ask
from specbatch.evaluation.serving import evaluate, report, training_accuracy
from specbatch.evaluation.statistics import DecodedAnswers
from specbatch.evaluation.summary import summary_line
from specbatch.inference.server import SGLangServer
from specbatch.rundir import RunDir, read_json

DRAFT_TOKENS, MAX_NEW_TOKENS = 3, 20
EVALUATION = {
    "acceptance_length": 1.934,
    "acceptance_rate": [0.5, 0.27, 0.17],
    "training_accuracy": [0.46, 0.41, 0.37, 0.33],
    "prompts": 40,
    "identical": 40,
    "tokens_per_s_plain": 100.04,
    "tokens_per_s_speculative": 78.0,
    "device": "cpu",
    "dtype": "float32",
    "batch_size": 40,
    "note": "on a CPU only the acceptance length counts: and why",
    "warnings": ["something is odd"],
}


def write_run(root: Path, target: Path, **evaluation: int) -> RunDir:
    """A run directory with a configuration and nothing else."""
    run_dir = RunDir(root)
    root.mkdir(parents=True)
    run_dir.config.write_text(
        json.dumps(
            {
                "run": {"dir": str(root)},
                "target": {"path": str(target)},
                "data": {
                    "train": [str(root / "train.jsonl")],
                    "heldout": [str(root / "heldout.jsonl")],
                    "cache_dir": str(root / "cache"),
                    "max_tokens": 256,
                },
                "evaluate": {"draft_tokens": DRAFT_TOKENS, "max_new_tokens": MAX_NEW_TOKENS} | evaluation,
            }
        )
    )
    config = load_config(run_dir.config)
    run_dir.config.write_text(dump_config(config))
    return run_dir


def conversations(path: Path, questions: list[str]) -> None:
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "It is so."}]}
        for question in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> RunDir:
    """A run whose draft is right now and then, and whose metrics do not contradict that."""
    from specbatch.corpus import attach, open_corpus, prepare
    from tests.inference.chain_reference import make_draft

    run_dir = write_run(tmp_path_factory.mktemp("runs") / "a run", tiny_target, prompts=6, batch_size=4)
    conversations(run_dir.root / "train.jsonl", ["Why?", "How?"])
    conversations(
        run_dir.root / "heldout.jsonl",
        [
            f"What does section {i} say about {subject}?"
            for i, subject in enumerate(["grants", "marks", "harm", "work", "you", "me"])
        ],
    )
    attach(run_dir, prepare(load_config(run_dir.config)))
    heldout = open_corpus(run_dir).heldout
    assert heldout is not None
    make_draft(run_dir.export, tiny_target, heldout.prompts(), MAX_NEW_TOKENS - 6, DRAFT_TOKENS)
    rows = [{"step": step, "loss": 1.0, "accuracy": [0.5, 0.6, 0.6, None]} for step in range(1, 30)]
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


@pytest.mark.light
def test_evaluation_is_what_transformers_and_the_paper_give(
    run_dir: RunDir, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
):
    """One of its answers is given another token, as a broken verification would. Two draft tokens are measured, too."""
    from specbatch.corpus import open_corpus
    from tests.inference.chain_reference import Drafter, Target

    def break_one(
        server: SGLangServer, subject: Subject, prompts: list[list[int]], draft_tokens: int
    ) -> DecodedAnswers:
        given = ask(server, subject, prompts, draft_tokens)
        if draft_tokens:
            given.tokens[2][5:] = [(given.tokens[2][5] + 7) % 512]
        return given

    monkeypatch.setattr(serving, "ask", break_one)
    settings = load_config(run_dir.config).evaluate
    settings.sweep.draft_tokens = [2]
    stages: list[tuple[str, int, int]] = []
    found = evaluate(run_dir, settings=settings, progress=lambda *stage: stages.append(stage))

    heldout = open_corpus(run_dir).heldout
    assert heldout is not None
    target = Target(tiny_target)
    drafter = Drafter(run_dir.export, target)
    answers = [target.answer(prompt, MAX_NEW_TOKENS, (2,)) for prompt in heldout.prompts()]
    counts = [drafter.histogram(p, a, DRAFT_TOKENS) for p, a in zip(heldout.prompts(), answers, strict=True)]
    histogram = [sum(column) for column in zip(*counts, strict=True)]
    assert min(histogram[:3]) > 0, "the draft should be right now and then"

    assert found["accepted_histogram"] == histogram
    assert found["verify_steps"] == sum(histogram)
    assert found["acceptance_length"] == pytest.approx(
        1 + (histogram[1] + 2 * histogram[2] + 3 * histogram[3]) / sum(histogram)
    )
    assert found["acceptance_rate"] == pytest.approx([sum(histogram[k:]) / sum(histogram) for k in (1, 2, 3)])
    low, high = found["acceptance_length_interval"]
    assert low <= found["acceptance_length"] <= high
    assert (found["prompts"], found["identical"]) == (6, 5)
    assert found["output_tokens"] == sum(map(len, answers)) - len(answers[2]) + 6
    [apart] = found["differences"]
    assert (apart["prompt"], apart["position"], apart["plain"]) == (2, 5, answers[2][5])
    ids = torch.tensor([[*heldout.prompts()[2], *answers[2][:5]]])
    with torch.no_grad():
        logits = target.model(ids).logits[0, -1]
    gap = logits[apart["plain"]] - logits[apart["speculative"]]
    assert (apart["verdict"], apart["logit_gap"]) == ("wrong", pytest.approx(float(gap), rel=1e-3))
    assert (found["device"], found["dtype"], found["draft_tokens"]) == ("cpu", "float32", DRAFT_TOKENS)
    assert found["tokens_per_s_plain"] > 0 < found["tokens_per_s_speculative"]
    assert found["training_accuracy"] == pytest.approx([0.5, 0.6, 0.6])
    assert "acceptance length" in found["note"]
    [warning] = found["warnings"]
    assert "output differs from plain decoding on 1 of 6 prompts" in warning
    assert "verification or the engine's drafting is wrong there" in warning
    plain, drafted = found["sweep"]["points"]
    assert [(each["draft_tokens"], each["batch_size"], each["prompts"]) for each in (plain, drafted)] == [
        (0, 4, 6), (2, 4, 6)
    ]  # fmt: skip
    twos = [drafter.histogram(p, a, 2) for p, a in zip(heldout.prompts(), answers, strict=True)]
    two = [sum(column) for column in zip(*twos, strict=True)]
    assert drafted["acceptance_length"] == pytest.approx(1 + (two[1] + 2 * two[2]) / sum(two))
    # Each of those that are kept accepts in its steps what the reference accepts. One may be missing: two of its steps
    # were reported as one.
    assert 1 <= len(found["answers"]) <= 4
    for answer in found["answers"]:
        told = [step["accepted"] for step in answer["steps"][1:]]
        prompt = int(answer["prompt"].split("What does section ")[1][0])
        assert [told.count(accepted) for accepted in range(DRAFT_TOKENS + 1)] == list(counts[prompt])
    assert read_json(run_dir.evaluation) == found
    assert {stage for stage, _, _ in stages} == {"starting engines", "plain decoding", "speculative decoding"}
    assert stages[-1] == ("speculative decoding", 6, 6)


@pytest.mark.light
def test_any_draft_is_measured_without_a_run(
    run_dir: RunDir, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Over two numbers of requests at once, and on a benchmark besides."""
    draft, heldout = tmp_path / "draft", run_dir.root / "heldout.jsonl"
    shutil.copytree(run_dir.export, draft)
    questions = [{"question": f"How many eggs has duck {i}?", "answer": f"#### {i}"} for i in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    words = ["--draft", draft, "--target", tiny_target, "--heldout", heldout, "--out", tmp_path / "out"]
    words += ["--sets.gsm8k", tmp_path / "test.jsonl", "--sweep.batch_sizes", "[1, 4]", "--prompts", 6]
    words += ["--draft_tokens", DRAFT_TOKENS, "--max_new_tokens", MAX_NEW_TOKENS, "--batch_size", 4]
    assert main(["evaluate", *map(str, words)]) == 0
    printed = capsys.readouterr().out
    found = read_json(tmp_path / "out" / "evaluation.json")
    assert (found["prompts"], found["identical"], found["differences"]) == (6, 6, [])
    assert (found["set"], found["training_accuracy"]) == ("heldout", None)
    points = found["sweep"]["points"]
    assert [(each["set"], each["batch_size"], each["draft_tokens"], each["prompts"]) for each in points] == [
        ("gsm8k", 1, 0, 4), ("gsm8k", 1, 3, 4), ("gsm8k", 4, 0, 4), ("gsm8k", 4, 3, 4),
        ("heldout", 1, 0, 6), ("heldout", 1, 3, 6), ("heldout", 4, 0, 6), ("heldout", 4, 3, 6),
    ]  # fmt: skip
    for point in points:
        assert 0 < point["first_token_s"] < point["seconds"]
        assert point["tokens_per_s"] * point["seconds"] == pytest.approx(point["output_tokens"])
        assert point["tokens_per_s_request"] > 0
    mine = [point for point in points if point["set"] == "heldout" and point["draft_tokens"]]
    assert {point["acceptance_length"] for point in mine} == {found["acceptance_length"]}
    low, high = mine[0]["acceptance_length_interval"]
    assert low <= found["acceptance_length"] <= high
    assert len(mine[0]["acceptance_rate_interval"]) == DRAFT_TOKENS
    best = found["sweep"]["best"]["latency"]
    assert best["batch_size"] == 1
    assert f"--model-path {tiny_target}" in best["serve"]["sglang"]
    assert best["serve"]["sglang"] in printed
    assert "acceptance length" in printed
    assert (tmp_path / "out" / "logs" / "evaluate-3.log").is_file()


def test_without_an_export_the_command_that_makes_one_is_named(tmp_path: Path, tiny_target: Path):
    run_dir = write_run(tmp_path / "run", tiny_target)
    with pytest.raises(UserError, match=f"specbatch export {run_dir.root}"):
        evaluate(run_dir)


def test_a_directory_that_is_no_draft_is_refused(tmp_path: Path, tiny_target: Path):
    run_dir = write_run(tmp_path / "run", tiny_target)
    with pytest.raises(UserError, match=r"has no config\.json"):
        evaluate(run_dir, draft=tmp_path)


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 511), ("hidden_size", 32)])
def test_a_draft_for_another_target_is_refused(tmp_path: Path, tiny_target: Path, name: str, value: int):
    run_dir = write_run(tmp_path / "run", tiny_target)
    run_dir.export.mkdir()
    (run_dir.export / "model.safetensors").touch()
    (run_dir.export / "config.json").write_text(json.dumps({"vocab_size": 512, "hidden_size": 64} | {name: value}))
    with pytest.raises(UserError, match=f"is {value}, but the target .* draft for another target"):
        evaluate(run_dir)


def drafted(run_dir: RunDir) -> RunDir:
    run_dir.export.mkdir()
    save_file({"fc.weight": torch.zeros(64, 192)}, run_dir.export / "model.safetensors")
    (run_dir.export / "config.json").write_text(json.dumps({"vocab_size": 512, "target_hidden_size": 64}))
    return run_dir


def test_no_prompts_are_refused(tmp_path: Path, tiny_target: Path):
    run_dir = drafted(write_run(tmp_path / "run", tiny_target))
    settings = dataclasses.replace(load_config(run_dir.config).evaluate, prompts=0)
    with pytest.raises(UserError, match=r"evaluate\.prompts is 0"):
        evaluate(run_dir, settings=settings)


@pytest.mark.light
def test_prompts_that_do_not_fit_are_refused_before_anything_starts(run_dir: RunDir):
    settings = dataclasses.replace(load_config(run_dir.config).evaluate, max_new_tokens=2040)
    with pytest.raises(UserError, match=r"none of the 6 prompts .*max_new_tokens 2040 .* 2048 tokens"):
        evaluate(run_dir, settings=settings)


@pytest.mark.light
def test_without_held_out_data_the_reason_is_told(tmp_path: Path, run_dir: RunDir, tiny_target: Path):
    from specbatch.corpus import attach, prepare

    other = drafted(write_run(tmp_path / "run", tiny_target))
    shutil.copy(run_dir.root / "train.jsonl", other.root / "train.jsonl")
    config = load_config(other.config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, heldout=[]))
    other.config.write_text(dump_config(config))
    attach(other, prepare(config))
    with pytest.raises(UserError, match=r"data\.heldout is empty"):
        evaluate(other)


def test_the_summary_is_one_line(tmp_path: Path):
    assert summary_line(EVALUATION, tmp_path / "run" / "export") == (
        "acceptance length 1.93 (plain decoding 1.00), output identical on 40 of 40 prompts, "
        f"draft in {tmp_path}/run/export"
    )


def test_the_summary_shows_a_short_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert summary_line(EVALUATION, tmp_path / "runs" / "quickstart" / "export").endswith(
        ", draft in runs/quickstart/export"
    )


def test_the_report_says_what_counts_on_a_cpu():
    assert report(EVALUATION) == [
        "drafts accepted by position: 50% 27% 17%",
        "accuracy at the end of training, each position by itself: 46% 41% 37% 33%",
        "tokens/s: 100.0 plain, 78.0 speculative (cpu, float32, 40 at once)",
        "note: on a CPU only the acceptance length counts: and why",
        "warning: something is odd",
    ]


def test_training_accuracy_is_the_mean_of_the_last_steps(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    rows = [[0.0, 0.0]] * 11 + [[0.5, None]] * 10 + [[0.7, 0.2]] * 10
    lines = [json.dumps({"step": step, "accuracy": row}) + "\n" for step, row in enumerate(rows, 1)]
    metrics.write_text("".join(lines) + '{"step": 32, "accuracy": [0.')
    found = training_accuracy(metrics)
    assert found == pytest.approx([(10 * 0.5 + 10 * 0.7) / 20, 0.2])


@pytest.mark.parametrize("text", ["", '{"step": 1}\n', '{"step": 1, "accuracy": [null, NaN]}\n'])
def test_training_accuracy_of_nothing_is_nothing(tmp_path: Path, text: str):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(text)
    assert training_accuracy(metrics) is None
    assert training_accuracy(tmp_path / "absent") is None
