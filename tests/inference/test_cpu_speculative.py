from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specbatch.inference import cpu_speculative
from specbatch.inference.cpu_speculative import Hook, mismatch
from specbatch.inference.server import RequestRefused, ServerDied, SGLangServer

DRAFT_TOKENS, MAX_NEW_TOKENS = 4, 18
LENGTHS = (3, 40, 9, 64, 21)


def test_a_hook_whose_place_is_gone_is_named():
    hook = Hook("json.no_such_function", lambda text: text, around=False)
    assert "json.no_such_function is missing" in (mismatch(hook) or "")


def test_a_hook_whose_place_takes_other_parameters_is_named():
    def other(text: str, encoding: str) -> None: ...

    assert mismatch(Hook("fnmatch.translate", other, around=False)) == (
        "fnmatch.translate takes pat, not text, encoding"
    )


def test_a_hook_around_its_place_takes_the_original_first():
    def around(original: Any, pat: str) -> None: ...

    assert mismatch(Hook("fnmatch.translate", around, around=True)) is None


def test_the_plugin_does_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(cpu_speculative.SELECT, raising=False)
    assert not cpu_speculative.selected()
    cpu_speculative.register()


def another_sglang(folder: Path, changed: str, before: str, after: str) -> None:
    """The installed SGLang as of another version: one file of it is changed, all others are links."""
    found = importlib.util.find_spec("sglang")
    assert found is not None
    assert found.submodule_search_locations
    original, copy = Path(next(iter(found.submodule_search_locations))), folder / "sglang"
    for part in Path(changed).parts:
        copy.mkdir(parents=True)
        for entry in original.iterdir():
            if entry.name not in (part, "__pycache__"):
                (copy / entry.name).symlink_to(entry)
        original, copy = original / part, copy / part
    text = original.read_text()
    assert before in text
    copy.write_text(text.replace(before, after))


@pytest.mark.light
def test_another_sglang_ends_the_process_with_our_message(tmp_path: Path):
    another_sglang(tmp_path, "kernels/ops/speculative/eagle.py", "    accept_stride: int,", "    stride: int,")
    result = subprocess.run(
        [sys.executable, "-c", "from specbatch.inference.cpu_speculative import register; register()"],
        env=os.environ | {cpu_speculative.SELECT: "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert re.search(
        r"SGLang is not the one that was hooked: \S+fill_bonus_tokens_func takes .* stride,", result.stderr
    )
    assert "Traceback" not in result.stderr


@pytest.mark.light
class TestFunctions:
    """The plain forms, each against what it stands for, written out."""

    def test_all_hooks_fit_the_installed_sglang(self):
        assert [mismatch(hook) for hook in cpu_speculative._hooks()] == [None] * 12

    @settings(deadline=None, max_examples=50)
    @given(st.data())
    def test_verification_accepts_up_to_the_first_wrong_draft(self, data: st.DataObject):
        from specbatch.inference.chain_drafting import verify_chain

        requests, width = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6))
        few = st.integers(0, 2)
        rows = st.lists(st.lists(few, min_size=width, max_size=width), min_size=requests, max_size=requests)
        candidates, target = torch.tensor(data.draw(rows)), torch.tensor(data.draw(rows))
        index = torch.arange(requests * width).view(requests, width)
        predicts = torch.zeros(requests * width, dtype=torch.int32)
        accept_index = torch.full((requests, width), -1, dtype=torch.int32)
        accepted = torch.empty(requests, dtype=torch.int32)
        verify_chain(predicts, accept_index, accepted, candidates, index, index, index, target)
        for r in range(requests):
            right = 0
            while right < width - 1 and candidates[r, right + 1] == target[r, right]:
                right += 1
            assert accepted[r] == right
            assert accept_index[r].tolist() == [*index[r, : right + 1].tolist(), *[-1] * (width - 1 - right)]
            assert predicts[index[r, : right + 1]].tolist() == target[r, : right + 1].tolist()

    def test_a_chain_is_a_tree_without_branches(self):
        from specbatch.inference.chain_drafting import build_chain

        positions = torch.empty(6, dtype=torch.int64)
        index, child, sibling = torch.empty(3, 2, 3, dtype=torch.int64)
        unused = torch.empty(0)
        build_chain(
            unused, unused, torch.tensor([5, 9]), unused, positions, index, child, sibling, 1, 2, 3, tree_mask_mode=None
        )
        assert positions.tolist() == [5, 6, 7, 9, 10, 11]
        assert index.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert child.tolist() == [[1, 2, -1], [1, 2, -1]]
        assert sibling.tolist() == [[-1] * 3] * 2

    def test_a_tree_with_branches_is_refused(self):
        from specbatch.inference.chain_drafting import build_chain

        with pytest.raises(NotImplementedError, match="speculative_eagle_topk 2"):
            build_chain(*[torch.empty(0)] * 8, 2, 3, 4, tree_mask_mode=None)

    def test_the_bonus_token_follows_the_last_accepted_draft(self):
        from specbatch.inference.chain_drafting import last_accepted

        bonus = torch.empty(2, dtype=torch.int32)
        last_accepted(torch.arange(8, dtype=torch.int32), torch.tensor([1, 4], dtype=torch.int32), bonus, 4, 2)
        assert bonus.tolist() == [0, 7]

    def test_slots_are_entered_and_found_again(self):
        from specbatch.inference.chain_drafting import assign_draft_slots, assign_request_slots

        table = torch.zeros(3, 8, dtype=torch.int32)
        rows = torch.tensor([2, 0])
        assign_request_slots(rows, table, torch.tensor([1, 4]), torch.tensor([4, 6]), torch.arange(10, 15), 2)
        assert table.tolist() == [[0, 0, 0, 0, 13, 14, 0, 0], [0] * 8, [0, 10, 11, 12, 0, 0, 0, 0]]
        found = torch.empty(4, dtype=torch.int64)
        assign_draft_slots(rows, table, torch.tensor([2, 4]), found, 1, 2)
        assert found.tolist() == [11, 12, 13, 14]

    @pytest.mark.parametrize("window", [None, 3])
    def test_a_chain_reads_its_prefix_and_itself_causally(self, window: int | None):
        from specbatch.inference.chain_drafting import attend_chain

        heads, kv_heads, dim, width = 4, 2, 8, 3
        generator = torch.Generator().manual_seed(0)
        keys, values = torch.randn(2, 20, kv_heads, dim, generator=generator)
        lengths = torch.tensor([5, 0])
        query = torch.randn(2 * width, heads, dim, generator=generator)
        table = torch.randperm(20, generator=generator).view(2, 10).int()
        found = attend_chain(
            lambda *_: pytest.fail("a verification is not a prompt"),
            None,  # type: ignore[arg-type]
            query,
            torch.empty_like(query),
            keys,
            values,
            table,
            torch.tensor([1, 0]),
            lengths,
            None,
            None,
            scaling=0.3,
            enable_gqa=True,
            causal=True,
            sliding_window_size=window,
        )
        for request, (row, length) in enumerate([(1, 5), (0, 0)]):
            for i in range(width):
                first = 0 if window is None else max(0, length + i - window)
                slots = table[row, first : length + i + 1].long()
                for head in range(heads):
                    score = (keys[slots, head // 2] @ query[request * width + i, head] * 0.3).softmax(0)
                    torch.testing.assert_close(found[request * width + i, head], score @ values[slots, head // 2])


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, prompts: list[list[int]]) -> Path:
    """A draft of EAGLE-3.1; other tests use EAGLE-3 itself."""
    from tests.inference.chain_reference import make_draft

    return make_draft(
        tmp_path_factory.mktemp("draft") / "draft", tiny_target, prompts, MAX_NEW_TOKENS - 6, DRAFT_TOKENS, norms=True
    )


def arguments(tiny_target: Path, draft: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model_path": tiny_target,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
        "max_total_tokens": 4096,
        "sleep_on_idle": True,
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": draft,
        "speculative_num_steps": DRAFT_TOKENS,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": DRAFT_TOKENS + 1,
    } | changes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, draft: Path) -> Iterator[SGLangServer]:
    """Prompts are prefilled in chunks, and three run at once while the others wait."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    given = arguments(tiny_target, draft, chunked_prefill_size=32, max_running_requests=3)
    with SGLangServer(given, log, {cpu_speculative.SELECT: "1"}, threads=1) as running:
        yield running


@pytest.mark.light
def test_each_request_is_drafted_as_the_paper_says(
    server: SGLangServer, tiny_target: Path, draft: Path, prompts: list[list[int]]
):
    from tests.inference.chain_reference import Drafter, Target

    sampling = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0, "stop_token_ids": [2]}
    results = server.generate({"input_ids": prompts, "sampling_params": sampling})
    target = Target(tiny_target)
    drafter = Drafter(draft, target)
    for prompt, result in zip(prompts, results, strict=True):
        answer = target.answer(prompt, MAX_NEW_TOKENS, (2,))
        assert result["output_ids"] == answer
        expected = drafter.histogram(prompt, answer, DRAFT_TOKENS)
        found = result["meta_info"]["spec_correct_drafts_histogram"]
        assert [*found, *[0] * (DRAFT_TOKENS + 1 - len(found))] == expected
        assert result["meta_info"]["spec_verify_ct"] == sum(expected)


@pytest.mark.light
@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"temperature": 0.7}, "temperature 0.7"),
        ({"temperature": 0, "regex": "a+"}, "regex a"),
        ({"temperature": 0, "repetition_penalty": 1.1}, "repetition_penalty 1.1"),
    ],
)
def test_what_is_not_greedy_is_refused_and_the_engine_lives_on(
    server: SGLangServer, sampling: dict[str, Any], named: str
):
    with pytest.raises(RequestRefused, match=f"400.*is greedy: it does not support {named}"):
        server.generate({"input_ids": [5, 6, 7], "sampling_params": sampling})
    greedy = {"temperature": 0, "max_new_tokens": 3}
    assert len(server.generate({"input_ids": [5, 6, 7], "sampling_params": greedy})["output_ids"]) == 3


@pytest.mark.light
def test_a_tree_of_drafts_is_refused_before_the_engine_loads(tmp_path: Path, tiny_target: Path, draft: Path):
    given = arguments(tiny_target, draft, speculative_eagle_topk=2)
    server = SGLangServer(given, tmp_path / "log", {cpu_speculative.SELECT: "1"}, threads=1)
    with pytest.raises(ServerDied, match=r"does not support speculative_eagle_topk 2 \(only 1\)"):
        server.start()
