"""Decodes a tiny target's held-out prompts with a run's exported draft, in an SGLang server."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from specbatch.config import load_config
from specbatch.corpus import open_corpus
from specbatch.corpus.images import Image, as_sent
from specbatch.drafts.base import algorithm_of
from specbatch.errors import RunError
from specbatch.inference import cpu_speculative, text_only
from specbatch.inference.server import SGLangServer
from specbatch.rundir import RunDir
from specbatch.target import read_target
from tools.targets.checkpoints import EOS

DRAFT_TOKENS = 3
PROMPTS, ANSWER_TOKENS = 4, 8
START_TIMEOUT_S = 300.0


class Drafting:
    """The server, a context manager; `start` starts it.

    Args:
        run: directory of the run.
        log: file for SGLang's output.
    """

    def __init__(self, run: Path, target: Path, log: Path) -> None:
        self.log = log
        heldout = open_corpus(RunDir(run)).heldout
        assert heldout is not None
        samples = [heldout.sample(i) for i in range(PROMPTS)]
        self.prompts = [sample.input_ids[: int(np.argmax(sample.loss_mask))] for sample in samples]
        self.images: list[tuple[Image, ...]] = [sample.images for sample in samples]
        algorithm = algorithm_of(load_config(run / "config.yaml"), read_target(str(target)))
        served = algorithm.files.serve("sglang", DRAFT_TOKENS)
        assert served is not None
        arguments = {
            "model_path": target, "dtype": "float32", "skip_tokenizer_init": True, "disable_radix_cache": True,
            "max_running_requests": PROMPTS, "max_total_tokens": 2048,
            **served, "speculative_draft_model_path": run / "export",
        }  # fmt: skip
        environment = {cpu_speculative.SELECT: "1", text_only.SELECT: "0" if any(self.images) else "1"}
        self._server = SGLangServer(arguments, log, environment, threads=1, start_timeout_s=START_TIMEOUT_S)

    def __enter__(self) -> Drafting:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop()

    def start(self) -> None:
        """Return when it has computed a token. Raises the same as `SGLangServer.start`."""
        self._server.start()

    def answers(self) -> list[list[int]]:
        """Return the token ids of the greedy answer to each prompt.

        Raises:
            RunError, RequestRefused: there are none, or none with a draft.
        """
        sampling = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0, "stop_token_ids": [EOS]}
        asked = {
            "input_ids": [as_sent(*pair).tolist() for pair in zip(self.prompts, self.images, strict=True)],
            "sampling_params": sampling,
        }
        if any(self.images):
            asked["image_data"] = [[image.url() for image in images] for images in self.images]
        results = self._server.generate(asked, tries=1)
        if any(not result["meta_info"].get("spec_verify_ct") for result in results):
            raise RunError("it answers without a single verify step")
        return [list(result["output_ids"]) for result in results]
