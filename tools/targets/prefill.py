"""``python -m tools.targets.prefill DIRECTORY...``: SGLang's class for each target computes one prefill.

It does so in a child of this process, with the arguments of a capturing engine. The captured states are verified by an
engine's probe, and compared with those of transformers. Prints a line of JSON for each target. No server, store or
trainer is started, so it takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from specbatch.inference.accelerator import CPU_PLATFORM, PLATFORM_VARIABLE

TOKENS = 48


def prefill(target: Path, layers: tuple[int, ...]) -> dict[str, Any]:
    """Return ``problem``, from the probe, and ``difference``, the largest relative one of a row of each tensor."""
    import torch

    from specbatch.drafts.sglang import layer_ids
    from specbatch.inference.capture_server import capture_arguments
    from specbatch.inference.contract_probe import LayerRecorder, Proof
    from specbatch.inference.server import CPU_ARGUMENTS, command_line
    from tools.targets.truth import architecture_of, load_truth, states_of

    ids = torch.randint(3, 500, (TOKENS,), generator=torch.Generator().manual_seed(3))
    arguments = {
        **CPU_ARGUMENTS, "model_path": str(target), "dtype": "float32", "max_total_tokens": 4096,
        "chunked_prefill_size": -1, "disable_decode_cuda_graph": True,
        **capture_arguments(layer_ids(architecture_of(target), layers)),
    }  # fmt: skip
    runner = _load(command_line(arguments))
    watch = LayerRecorder(runner.model, runner.model_config.num_hidden_layers)
    proof = Proof(layers, type(runner.model).__name__)
    with watch:
        output = _forward(runner, ids.tolist())
    told = {"class": type(runner.model).__name__, "problem": proof.hooked(watch, output, slice(0, TOKENS))}
    states = states_of(load_truth(target), ids)
    truth = {"aux": torch.cat([states[layer + 1] for layer in layers], -1), "last": states[-1]}
    found = {"aux": output.hidden_states, "last": output.last_hidden_states}
    worst = {name: ((found[name] - rows).norm(dim=1) / rows.norm(dim=1)).max().item() for name, rows in truth.items()}
    return {**told, "difference": worst}


def _load(words: list[str]) -> Any:
    """Return SGLang's ``ModelRunner``, constructed as in its own benchmark of one batch."""
    from sglang.benchmark import one_batch
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
    from sglang.srt.server_args import PortArgs, prepare_server_args

    server_args = prepare_server_args(words)
    server_args.resolve_once()
    one_batch._set_envs_and_config(server_args)
    ports = PortArgs.init_new(server_args)
    rank = spawn_world_rank(server_args, tp_rank=0, pp_rank=0)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=0))
    one_batch._init_process_global_configs()
    one_batch.get_tokenizer = lambda *words, **options: None
    return one_batch.load_model(server_args, ports, 0, 0)[0].torch_runner


def _forward(runner: Any, ids: list[int]) -> Any:
    from sglang.benchmark import one_batch

    given = SimpleNamespace(output=None)
    forward = runner.forward

    def keep(*arguments: Any, **options: Any) -> Any:
        result = forward(*arguments, **options)
        given.output = result.logits_output
        return result

    runner.forward = keep
    one_batch.BenchArgs.output_len = 0
    one_batch.extend(one_batch.prepare_synthetic_inputs_for_latency_test(1, len(ids), [ids]), runner)
    return given.output


def main(words: list[str]) -> None:
    """Compute the prefills in children of one process, which has imported everything once."""
    parser = argparse.ArgumentParser(prog="tools.targets.prefill", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIRECTORY")
    parser.add_argument("--layers", nargs=3, type=int, default=(1, 3, 4), help="whose outputs are captured")
    options = parser.parse_args(words)
    os.environ |= {PLATFORM_VARIABLE: CPU_PLATFORM, "TORCHDYNAMO_DISABLE": "1"}
    import sglang.benchmark.one_batch  # noqa: F401
    import transformers  # noqa: F401  # once for all children
    from sglang.srt.plugins import load_plugins

    load_plugins()
    for folder in options.folders:
        told = _in_child(folder, tuple(options.layers))
        print(json.dumps({"target": folder.name, **told}), flush=True)


def _in_child(folder: Path, layers: tuple[int, ...]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            told = prefill(folder, layers)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            words = " ".join(f"{type(error).__name__}: {error}".split())
            told = {"error": f"{words[:300]} ({Path(place.filename).name}:{place.lineno})"}
        os.write(writing, json.dumps(told).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return dict(json.loads(said)) if said else {"error": "its process ended without output"}


if __name__ == "__main__":
    main(sys.argv[1:])
