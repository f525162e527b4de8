"""Creates a run of a few steps with random tokens, in the doctor's own directory, with packs that are full."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from specbatch.config import Config, Data, Evaluate, dump_config
from specbatch.config.rules import Interval
from specbatch.corpus import attach, prepare
from specbatch.corpus.tokenizer import load_tokenizer, tokenizer_size
from specbatch.rundir import RunDir, write_whole
from specbatch.target import read_target

STEPS = 3
"""Steps of the trial; the first includes one-time costs."""
PROMPT_SHARE = 1 / 8
"""Share of a sample's tokens that are not learnt."""
ROWS = "made-up.jsonl"
ATTEMPT = 1
"""The only attempt in the doctor's own directory."""
OF_RUN = "run.yaml"
"""The configuration of the run itself, in the doctor's directory."""


def make_trial(config: Config, root: Path) -> Config:
    """Write the doctor's directory: a configuration of a few steps, and full packs.

    Args:
        config: the run's configuration, as it would be submitted.
        root: an empty or new directory.

    Returns:
        the configuration of the trial.

    Raises:
        UserError: the tokenizer can't be loaded.
    """
    run_dir = RunDir(root)
    run_dir.make()
    # It gets keys and logs, as a run's.
    run_dir.attempt(ATTEMPT).mkdir(parents=True, mode=0o700)
    trial = replace(
        config,
        run=replace(config.run, dir=str(root)),
        data=Data(
            train=[str(root / ROWS)], max_tokens=config.data.max_tokens, cache_dir=str(root / "cache"), workers=1
        ),
        training=replace(config.training, epochs=1, max_steps=STEPS, warmup_steps=1, evaluate_interval_steps=None),
        snapshot=replace(config.snapshot, interval=Interval(str(STEPS)), record=0),
        evaluate=Evaluate(prompts=0),
    )
    write_whole(root / OF_RUN, dump_config(config).encode())
    vocabulary = min(read_target(config.target.path).vocab, tokenizer_size(load_tokenizer(config)))
    generator = np.random.default_rng(config.run.seed)
    with (root / ROWS).open("w") as file:
        for tokens in _lengths(trial):
            ids = generator.integers(0, vocabulary, tokens)
            mask = [int(i >= tokens * PROMPT_SHARE) for i in range(tokens)]
            file.write(json.dumps({"input_ids": ids.tolist(), "loss_mask": mask}) + "\n")
    write_whole(run_dir.config, dump_config(trial).encode())
    attach(run_dir, prepare(trial))
    return trial


def _lengths(config: Config) -> list[int]:
    """Return the tokens of each sample, such that they fill all packs of all steps."""
    longest, pack = config.data.max_tokens, config.training.tokens_per_pack
    each = [longest] * (pack // longest)
    return each * config.training.packs_per_step * STEPS
