"""Decides whether the prepared data are good enough for a run, and says what to do if not."""

from __future__ import annotations

from specbatch.config import Config
from specbatch.corpus.summary import Part
from specbatch.errors import UserError


def judge(config: Config, title: str, part: Part) -> None:
    """Refuse data that is mostly unusable, or of which nothing is left.

    Raises:
        UserError: the data is refused.
    """
    listed = "".join(f"\n  {item.text()}" for item in part.skipped)
    if not part.samples and not part.prompts:
        raise UserError(
            f"the {title} data gives no sample out of {part.rows:,} rows:{listed}\n{_likeliest(config, part)}"
        )
    counted = part.rows - sum(item.count for item in part.skipped if item.reason == "blank line")
    share = part.bad_rows / max(1, counted)
    if share > config.data.max_bad_fraction:
        raise UserError(
            f"{part.bad_rows:,} of {counted:,} rows of the {title} data are unusable ({100 * share:.1f} %), and "
            f"data.max_bad_fraction allows {100 * config.data.max_bad_fraction:.1f} %:{listed}\n"
            "fix the rows, or allow more"
        )


_LINES = "a file has to have one JSON object in each line, or, as .json, be one array of objects"
_ADVICE = {
    "without the key": "the columns have other names: set them, as in data.columns: {messages: conversation}",
    "without anything in": "data.columns or data.format do not fit these data",
    "preformatted text": "another model's chat template has rendered the text: use the original conversations, "
    "or data.loss_on: all",
    "not JSON": _LINES,
    "not an object": _LINES,
    "no assistant turn": "these are prompts without answers: let the target answer them with `specbatch regenerate`",
    "refused by the chat template": "the target's chat template does not accept conversations of this shape",
    "unknown role": "rename the roles of the data",
    "mask not provable": "the target's chat template hides which tokens the assistant writes: "
    "`specbatch data --template-report` shows for which conversations; a template with {% generation %} markers helps",
    "no loss token within max_tokens": "raise data.max_tokens",
    "longer than max_tokens": "raise data.max_tokens, or set data.overlong: truncate",
    "no loss token": "answers are empty or too short to learn from",
}


def _likeliest(config: Config, part: Part) -> str:
    """Return advice for a corpus of which nothing is left."""
    reasons = [item for item in part.skipped if item.reason != "blank line"]
    if not reasons:
        return f"the files are empty: {', '.join(config.data.train)}"
    for beginning, advice in _ADVICE.items():
        if reasons[0].reason.startswith(beginning):
            return f"most likely cause: {advice}"
    return f"most likely cause: the data does not have the expected form ({reasons[0].reason})"
