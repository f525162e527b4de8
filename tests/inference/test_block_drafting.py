"""SGLang's own DFlash worker on a CPU: what it proposes is what the trainer's module proposes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from specbatch.config import Config, Data, Run, Target
from specbatch.drafts.block.algorithm import DFlash
from specbatch.drafts.block.config import DFlashDraft
from specbatch.drafts.block.model import BlockModule
from specbatch.drafts.pack import PackTensors
from specbatch.inference import cpu_speculative
from specbatch.inference.server import SGLangServer
from specbatch.target import embedding, lm_head, read_target

BLOCK, MASK_TOKEN, MAX_NEW_TOKENS = 4, 400, 24

NOTING = '''
"""Notes each proposed block: a plug-in of SGLang for the test."""

import json, os


def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    place = "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2._accept_block"
    HookRegistry.register(place, note, HookType.AROUND)


def note(original, self, **block):
    with open(os.environ["NOTED_BLOCKS"], "a") as file:
        for prefix, tokens in zip(block["prefix_lens"].tolist(), block["candidates"].tolist()):
            file.write(json.dumps([prefix, tokens]) + "\\n")
    return original(self, **block)
'''


def plugin(folder: Path) -> str:
    """A PYTHONPATH with the plug-in as a distribution of its own."""
    info = folder / "noting-0.dist-info"
    info.mkdir(parents=True)
    (folder / "noting.py").write_text(NOTING)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: noting\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nnoting = noting:register\n")
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def random_draft(folder: Path, target_path: Path) -> BlockModule:
    """A draft whose attention and MLPs weigh as much as its embeddings, on disk and in the trainer's form."""
    target = read_target(target_path)
    config = Config(
        run=Run(dir="run"), target=Target(path=str(target_path)), data=Data(train=["a.jsonl"]),
        draft=DFlashDraft(num_layers=2, block_size=BLOCK, mask_token_id=MASK_TOKEN, aux_layers=[1, 2, 4]),
    )  # fmt: skip
    algorithm = DFlash(config, target)
    module = algorithm.module()(algorithm.settings(None))
    module.initialize(0, embedding(target), lm_head(target))
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(parameter.shape, generator=generator)
            fresh = 1 + 0.2 * noise if parameter.ndim == 1 else 2 * noise * parameter.shape[1] ** -0.5
            parameter.copy_(fresh.bfloat16())
    tensors = algorithm.files.checkpoint(module.state_dict(), "here")
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    hf_config = algorithm.files.hf_config(tensors, target_name="target", draft_tokens=BLOCK - 1)
    (folder / "config.json").write_text(json.dumps(hf_config))
    return module


@pytest.mark.light
def test_sglang_proposes_what_the_trainers_module_proposes_and_decodes_as_without(tmp_path: Path, tiny_target: Path):
    module = random_draft(tmp_path / "draft", tiny_target)
    noted = tmp_path / "blocks.jsonl"
    arguments = {
        "model_path": tiny_target, "dtype": "float32", "skip_tokenizer_init": True, "disable_radix_cache": True,
        "max_total_tokens": 4096, "max_running_requests": 2, "chunked_prefill_size": 32, "sleep_on_idle": True,
        "speculative_algorithm": "DFLASH", "speculative_draft_model_path": tmp_path / "draft",
    }  # fmt: skip
    environment = {
        cpu_speculative.SELECT: "1", "NOTED_BLOCKS": str(noted), "PYTHONPATH": plugin(tmp_path / "site"),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    # Lengths so far apart that a block's prefix says which request it belongs to.
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in (3, 40, 80)]
    sampling = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0, "stop_token_ids": [2]}
    with SGLangServer(arguments, tmp_path / "server.log", environment, threads=1) as server:
        noted.unlink(missing_ok=True)
        results = server.generate({"input_ids": prompts, "sampling_params": sampling})
    blocks = [json.loads(line) for line in noted.read_text().splitlines()]
    target = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()
    compared = 0
    for prompt, result in zip(prompts, results, strict=True):
        text = prompt + result["output_ids"]
        with torch.no_grad():
            out = target.model(torch.tensor([text]), output_hidden_states=True)
            greedy = target.lm_head(out.last_hidden_state[0]).argmax(-1).tolist()
        assert text[len(prompt) :] == greedy[len(prompt) - 1 : len(text) - 1]
        mine = [block for block in blocks if len(prompt) <= block[0] < len(text) - BLOCK]
        # The module proposes at every loss token that another one follows.
        mask = [False] * len(prompt) + [True] * (len(text) - len(prompt))
        rows = module_rows(out, mask)
        pack = PackTensors(torch.tensor(text), torch.tensor(mask), (len(text),), rows)
        _, proposed = module.evaluate(pack, torch.ones(BLOCK - 1))
        for prefix, tokens in mine:
            assert tokens[0] == text[prefix], "the anchor is the newest token"
            assert tokens[1:] == proposed[:, prefix].tolist()
            compared += 1
        steps = result["meta_info"]["spec_correct_drafts_histogram"]
        assert sum(steps) == result["meta_info"]["spec_verify_ct"]
    assert compared > 30


def module_rows(out: object, mask: list[bool]) -> dict[str, torch.Tensor]:
    """Return the states of a target that the contract names."""
    from specbatch.drafts.block.contract import BlockContract

    rows = BlockContract((1, 2, 4), 64).rows(torch.tensor(mask).numpy())
    aux = torch.cat([out.hidden_states[layer + 1][0] for layer in (1, 2, 4)], -1)
    last = out.last_hidden_state[0]
    return {name: tensor[torch.from_numpy(rows[name])] for name, tensor in (("aux", aux), ("last", last))}
