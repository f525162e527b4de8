"""The step as a program: what it needs, and what it says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from specbatch.drafts.attention import cpu, gpu
from specbatch.drafts.eagle3.cost import costs_of
from specbatch.drafts.eagle3.memory import Shape
from specbatch.drafts.masks import Masks
from tests.drafts.eagle3.test_device import away
from tests.drafts.eagle3.test_model import WHOLE, make_draft, pack_of, reference
from tests.drafts.samples import WEIGHTS, difference, ours
from tests.drafts.test_attention import Case, make_case
from tools.bench import step as program
from tools.bench.plain_eagle3 import plain_step
from tools.bench.step_data import SHAPES, conversations
from tools.bench.step_measure import Operations, countable_attention

ROOT = Path(__file__).parents[3]
STEP = ROOT / "tools" / "bench" / "step.py"

BLOCKER = """
import runpy, sys
refused, finders = set({refused!r}), list(sys.meta_path)
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            return None
        return next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)
sys.meta_path[:] = [Blocker()]
sys.argv = [{step!r}, *{arguments!r}]
runpy.run_path({step!r}, run_name="__main__")
"""


def without(refused: set[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program where some packages can't be imported."""
    code = BLOCKER.format(refused=sorted(refused), step=str(STEP), arguments=[*arguments, "--threads", "1"])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def of_torch() -> set[str]:
    """torch, and what it asks for, whoever asks in between."""
    found, queue = set(), ["torch"]
    while queue:
        name = queue.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            asked = requires(name) or []
        except ModuleNotFoundError:
            continue
        queue += [r.split(";")[0].split("[")[0].strip(" ()<>=!~0123456789.,*") for r in asked if "extra ==" not in r]
    return found


@pytest.mark.light
@pytest.mark.parametrize("only", ["ours", "plain"])
def test_torch_and_numpy_are_all_that_the_program_needs(only: str) -> None:
    allowed = of_torch() | {"numpy"}
    others = {
        module
        for module, owners in packages_distributions().items()
        if module != "specbatch" and not {owner.lower().replace("_", "-") for owner in owners} & allowed
    }
    assert {"yaml", "transformers", "torchtitan", "msgspec"} <= others
    done = without(
        others, "--tokens", "192", "--loss-fraction", "1", "--ttt-steps", "2", "--repeat", "0", "--only", only
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["tokens_per_s"] > 0


@pytest.mark.light
def test_its_last_line_has_both_rates_and_peaks_and_the_losses_are_the_same() -> None:
    command = [
        sys.executable, str(STEP), "--tokens", "2048", "--loss-fraction", "1", "--ttt-steps", "3", "--threads", "1",
        "--repeat", "0",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ratio"] == pytest.approx(found["tokens_per_s"] / found["plain_tokens_per_s"])
    assert found["loss"] == pytest.approx(found["plain_loss"], rel=1e-6)
    # Fewer tokens would not do: a CPU takes 1,024 columns at once, and the allocator keeps as much as one chunk saves.
    assert 0 < found["peak_bytes"] < 0.6 * found["plain_peak_bytes"]
    assert found["tokens"] == 2048


def test_the_published_algorithm_gives_the_same_loss_and_gradients() -> None:
    _, samples, _ = reference()
    draft, weights = make_draft(3, WHOLE), WEIGHTS[:3]
    expected, gradients = ours(draft, pack_of(samples), weights)
    draft.zero_grad()
    loss = plain_step(draft, pack_of(samples), [(sample.aux, sample.last) for sample in samples], weights)
    assert loss.item() == pytest.approx(expected[0].sum().item(), rel=1e-6)
    assert difference({name: p.grad for name, p in draft.named_parameters()}, gradients) < 1e-5


def test_the_published_algorithm_runs_on_a_device_though_masks_are_on_the_host() -> None:
    _, samples, _ = reference()
    draft, pack = away(make_draft(3, WHOLE), pack_of(samples))
    states = [(sample.aux.to("meta"), sample.last.to("meta")) for sample in samples]
    assert plain_step(draft, pack, states, WEIGHTS[:3].float().to("meta")).device.type == "meta"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_of_every_form_of_a_product_are_counted(device: str) -> None:
    a, b, total = torch.ones(2, 3, device=device), torch.ones(3, 5, device=device), torch.ones(2, 5, device=device)
    low_a, low_b = a.bfloat16(), b.bfloat16()
    with Operations() as counter:
        products = [a @ b, torch.addmm(total, a, b), total.addmm_(a, b), (a[None] @ b[None])[0]]
        if device == "meta":  # As on a GPU; a CPU has no such product.
            products.append(torch.mm(low_a, low_b, out_dtype=torch.float32))
            products.append(torch.addmm(total, low_a, low_b, out_dtype=torch.float32, out=total))
    assert counter.total == len(products) * 2 * 2 * 3 * 5


def by_formula(tokens: int, *, mean: int, fraction: float, ttt_steps: int) -> float:
    """Operations of a step as `specbatch plan` counts them."""
    masks = [np.array(mask) for mask in conversations(tokens, mean, fraction)]
    return float(costs_of(Masks.of(masks), ttt_steps, Shape(*SHAPES["smollm2"])).flops_S.sum())


@pytest.mark.light
def test_operations_a_token_stay_the_same_from_1k_tokens_on() -> None:
    """With samples of the same length, attention costs the same; the counts equal a plan's."""
    command = [
        sys.executable, str(STEP), "--tokens", "2048", "--loss-fraction", "0.5", "--ttt-steps", "2", "--threads", "1",
        "--repeat", "0", "--mean-length", "256", "--scaling",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    small, large = found["operations_per_token"]
    assert large == pytest.approx(small, rel=0.15)
    assert found["tokens"] == [1024, 2048]
    assert large == pytest.approx(by_formula(2048, mean=256, fraction=0.5, ttt_steps=2) / 2048, rel=0.04)
    assert found["power"] == pytest.approx(math.log2(2 * found["tokens_per_s"][0] / found["tokens_per_s"][1]))


def test_the_power_of_a_growth_is_found() -> None:
    assert program.power([1024, 2048, 4096], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert program.power([1024, 2048, 4096], [3.0, 12.0, 48.0]) == pytest.approx(2)


def counted(case: Case, attend) -> int:
    with Operations() as counter, torch.no_grad():
        attend(*case.first, [], case.prefix_mask)
    return counter.total


def test_operations_of_a_gpus_attention_are_counted_by_the_cpus() -> None:
    """FlexAttention refuses to be looked into."""
    case = make_case([300, 500], steps=0, dtype=torch.float32)

    def as_on_a_gpu(*arguments) -> torch.Tensor:
        return gpu.attend(*arguments)

    def by_itself(q, k, v, own, prefix_mask) -> torch.Tensor:
        return gpu.flex_prefix(q, k, v, prefix_mask, kernel=flex_attention)[0]

    with pytest.raises(NotImplementedError, match="flex_attention"):
        counted(case, by_itself)
    with countable_attention():
        found = counted(case, as_on_a_gpu)
    assert found == counted(case, cpu.attend) > 0
