"""The documentation is true: the site builds, links lead somewhere, commands run, and quoted messages exist.

A fenced block of ``bash`` is run, unless its first line says what it needs (``# needs a Slurm cluster``). A block of
``yaml`` whose first line is ``# NAME.yaml`` is that file, for the commands below it.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from specbatch.cli import VERBS, main
from specbatch.config.load import config_options
from specbatch.config.profile import profiles
from specbatch.report.rules import RULES

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted((REPOSITORY / "docs").rglob("*.md"))
README = REPOSITORY / "README.md"
TEXTS = {str(page.relative_to(REPOSITORY)): page.read_text() for page in [*PAGES, README]}
NEEDS = "# needs "
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HERE = ["--slurm.shared_dirs=[/]", "--inference.gpu="]
"""Options of `submit` in a temporary directory, without asking SGLang, which takes long and has tests of its own."""
FOLDERS = ("specbatch/", "tests/", "tools/", "configs/", "slurm/")


def blocks(page: str, *languages: str) -> Iterator[tuple[str, str]]:
    """Language and text of a page's fenced blocks, in order."""
    return ((found[1], found[2]) for found in FENCE.finditer(TEXTS[page]) if found[1] in languages)


def test_the_site_builds_and_all_links_and_anchors_lead_somewhere(tmp_path: Path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    config = load_config(str(REPOSITORY / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    warnings = io.StringIO()
    try:
        with contextlib.redirect_stderr(warnings):
            build(config)
    except Abort as error:
        pytest.fail(f"{error}: run `mkdocs build --strict`")
    built = {path.parent.name for path in (tmp_path / "site").rglob("index.html")}
    assert {"configuration", "verbs", "errors", "whole-nodes"} <= built
    # Nothing is loaded from another host.
    for path in (tmp_path / "site").rglob("index.html"):
        assert re.findall(r'(?:src=|<link[^>]*href=)"https?:', path.read_text()) == []


def test_the_reference_has_every_key_and_every_verb():
    from tools.docs import configuration_page, verbs_page

    keys, verbs = configuration_page(), verbs_page()
    assert [name for name in config_options() if f'<a id="{name}"></a>`{name}`' not in keys] == []
    assert "`draft.markov_rank`" in keys
    assert [verb for verb in VERBS if f"## {verb}\n" not in verbs or f"usage: specbatch {verb} " not in verbs] == []
    assert "training.learning_rate" not in verbs.split("## run\n")[1].split("## resume")[0]


@pytest.fixture
def desk(tmp_path: Path, phantom: Callable[[str], Path], tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to type commands in: Qwen3-8B is in the hub's cache, without weights, and conversations are there."""
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-8B" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(phantom("qwen3-8b"))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    folder = tmp_path / "desk"
    folder.mkdir()
    for name in ("train", "heldout"):
        answer = {"role": "assistant", "content": f"It is {name}."}
        rows = [{"messages": [{"role": "user", "content": f"What is {i}?"}, answer]} for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)
    return folder


RUN = [page for page, text in TEXTS.items() if re.search(rf"^```bash\n(?!{NEEDS})", text, re.MULTILINE)]


@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_run(page: str, desk: Path):
    for language, text in blocks(page, "bash", "yaml"):
        first = text.splitlines()[0]
        if language == "yaml" and (named := re.fullmatch(r"# ([\w.-]+\.yaml)", first)):
            (desk / named[1]).write_text(text)
        elif language == "bash" and not first.startswith(NEEDS):
            run_block(text)


def run_block(text: str) -> None:
    """Run a block: specbatch's own commands in this process, which is quicker, and all others in a shell."""
    lines = text.replace("\\\n", " ").strip().splitlines()
    if not any(line.startswith("specbatch ") for line in lines):
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True, timeout=60)
        return
    for line in lines:
        if line.startswith("specbatch "):
            words = shlex.split(line, comments=True)[1:]
            output = Path(words.pop()) if words[-2:-1] == [">"] and words.pop(-2) else None
            words += HERE if words[0] == "submit" else []
            assert run_verb(words, output) == 0, line
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True, timeout=60)


def run_verb(words: list[str], output: Path | None) -> int:
    """Run a verb, and return its exit code."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            code = main(words)
        except SystemExit as ended:
            code = int(ended.code or 0)
    if output is not None:
        output.write_text(text.getvalue())
    return code


@pytest.mark.parametrize("page", TEXTS)
def test_commands_that_are_not_run_say_what_they_need_and_have_known_verbs(page: str):
    for _, text in blocks(page, "bash"):
        for line in text.splitlines():
            words = line.split()
            if words[:1] == ["specbatch"]:
                assert words[1] in VERBS, line
        first = text.splitlines()[0]
        assert not first.startswith("#") or first.startswith(NEEDS), f"{first}: must begin with {NEEDS.strip()}"
    # Verbs in the text.
    said = set(re.findall(r"`specbatch ([a-z]+)[ `]", TEXTS[page]))
    assert said <= {*VERBS, "run"}


@cache
def constants() -> tuple[str, ...]:
    """All texts in specbatch's source, with a gap where a value is put in."""
    found = []
    for path in sorted((REPOSITORY / "specbatch").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def quoted(page: str) -> list[str]:
    """The messages that a page quotes."""
    lines = re.findall(r"(?:^>.*\n)+", TEXTS[page], re.MULTILINE)
    parts = [part for quote in lines for part in re.split(r"^>\s*\n", quote, flags=re.MULTILINE)]
    return [" ".join(part.replace(">", " ").split()) for part in parts]


def test_every_quoted_message_is_one_of_specbatch():
    messages = quoted("docs/errors.md")
    assert len(messages) > 30
    patterns = {message: ".*".join(re.escape(piece.strip()) for piece in message.split("…")) for message in messages}
    unknown = [
        message
        for message, pattern in patterns.items()
        if not any(re.search(pattern, text, re.DOTALL) for text in constants())
    ]
    assert unknown == []


@pytest.mark.parametrize("page", TEXTS)
def test_files_and_keys_that_a_page_names_exist(page: str):
    spans = re.findall(r"`([^`\n]+)`", re.sub(FENCE, "", TEXTS[page]))
    keys = {key for algorithm in ("eagle3", "dflash", "dspark") for key in config_options(algorithm)}
    sections = {key.split(".")[0] for key in keys}
    folders = {key.rpartition(".")[0] for key in keys}
    for span in spans:
        if span.startswith(FOLDERS) and not re.search(r"[*<> ]", span):
            assert (REPOSITORY / span).exists(), span
        named = re.fullmatch(r"([a-z]+)((?:\.[a-z_]+)+)(?:: .*)?", span)
        if named and named[1] in sections and not named[2].endswith((".yaml", ".jsonl", ".json", ".log")):
            key = named[1] + named[2]
            known = key in keys or key in folders or key.rpartition(".")[0] in ("inference.sglang", "slurm.extra")
            assert known, span


def test_each_profile_is_on_the_page_of_its_kind():
    kinds: dict[str, set[str]] = {}
    for line in re.findall(r"^\|.*\.md\).*\|$", TEXTS["docs/slurm/index.md"], re.MULTILINE):
        page = re.search(r"\(([\w-]+\.md)\)", line)[1]
        kinds[page] = set(re.findall(r"`([\w-]+)`", line))
    assert set.union(*kinds.values()) == set(profiles())
    for page, names in kinds.items():
        for name in names:
            slurm = yaml.safe_load(profiles()[name].read_text())["slurm"]
            kind = (slurm["layout"] == "het", slurm["gpus"] == "none")
            expected = {"cpu-and-gpu.md": (True, False), "whole-nodes.md": (False, False)}
            assert kind == expected.get(page, (False, True)), name
            assert f"`{name}`" in TEXTS[f"docs/slurm/{page}"]
    for line in re.findall(r"^\| `(\w+)` \|.*\|$", TEXTS["docs/slurm/no-gpu-requests.md"], re.MULTILINE):
        forbidden = yaml.safe_load(profiles()[line].read_text())["slurm"].get("forbidden", {})
        row = re.search(rf"^\| `{line}` \|.*$", TEXTS["docs/slurm/no-gpu-requests.md"], re.MULTILINE)[0]
        assert {name for name in forbidden if f"`{name}`" in row} == set(forbidden)


def test_the_page_about_reports_has_every_rule():
    assert [name for name in RULES if f"| {name} |" not in TEXTS["docs/report.md"]] == []


def test_pictures_are_drawn_for_light_and_dark():
    for path in sorted((REPOSITORY / "docs" / "images").glob("*.svg")):
        text = path.read_text()
        assert "prefers-color-scheme:dark" in text
        assert "<title>" in text
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
