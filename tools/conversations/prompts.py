"""Chooses prompts for the quickstart: suitable texts of two free collections, without similar ones.

The result depends only on the collections, so the same packages give the same prompts.
"""

from __future__ import annotations

import json
import random
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

SHORTEST, LONGEST = 12, 200
"""Characters of a prompt."""
TOPICS = (
    *("ai", "botprofile", "computers", "conversations", "emotion", "food", "greetings", "health", "history", "humor"),
    *("literature", "money", "movies", "science", "tech_support", "trivia"),
)
"""Topics of chatterbot-corpus, without coding, since this target writes endless programs, and offensive ones."""
COMMON = 50
"""Least number of occurrences of every word of a dialogue's question, which excludes names, handles and typos."""
SIMILAR = 0.6
"""Share of common words, as sets, above which two prompts count as similar."""

QUESTION = re.compile(
    r"(are|can|could|did|do|does|has|have|how|if|in|is|should|was|were|what|what's|when|where|which|who|why|will|would)\b"
)
"""Beginnings of questions that make sense without the preceding dialogue."""
CONTACT = re.compile(r"@|www|https?:|\.com\b|\d{4,}|[<>{}\[\]|\\^~*_=#]")
"""Matches addresses, numbers long enough to be private, and text that is not plain."""
ALLUSION = re.compile(
    r"\b(that|those|these|this|them|they|he|she|her|his|him|it|its|u|ur|lol|haha\w*|eve|byu|else|here|there|ya|ok|so"
    r"|both|one|ones|today|tomorrow|tonight|yesterday|major|semester|class|classes|finals|prompt|challenge)\b"
)
"""Words that refer to something said before, or that only the collection's own people would understand."""
UNWANTED = re.compile(
    r"\b(abort|abus|alcohol|amish|atheis|beer|bitch|bomb|bible|booze|bullsh|catholic|christ|church|cocaine|communis|cock|crap"
    r"|cunt|damn|dead|death|democrat|depress|dick|die\b|dies\b|died|drug|drunk|dumb|fag|fat\b|feminis|fuck|gay|genocid|god\b"
    r"|gods|guns?\b|hate|hell\b|heroin|hitler|holocaust|homo|idiot|illegal|immature|immigra|islam|jesus|jew|kill|kiss|lds"
    r"|lesbian|liar|lied|marijuana|mission|moron|mormon|murder|muslim|naked|nazi|negro|nigg|nsfw|nude|obama|penis|pee\b"
    r"|poop|porn|pray|pregnan|priest|prophet|prostitut|psychiatr|queer|racis|rape|rapist|religio|republican|retard"
    r"|sex|shit|shoot|shot\b|slave|slut|smok|stab|stalin|stupid|suck|suicid|terror|terrori|torture|transgender|trump|ugly"
    r"|vagina|violen|virgin|vodka|war\b|weapon|weed|whisk|whore|wine)\w*"
)
"""Stems of words that a first example should avoid: offensive and controversial topics."""


def clean(text: str) -> str | None:
    """Return the text as a prompt, or None if it is unsuitable."""
    text = " ".join(text.replace("’", "'").split())
    if not SHORTEST <= len(text) <= LONGEST or not text.isascii() or CONTACT.search(text):
        return None
    if text.isupper() or UNWANTED.search(text.lower()):
        return None
    return text[0].upper() + text[1:]


def stands_alone(text: str) -> bool:
    """Return whether a line of a dialogue is a question that can begin a conversation and names no person."""
    if not QUESTION.match(text.lower()) or not text.endswith("?") or text.count("?") > 1:
        return False
    if ALLUSION.search(text.lower()) or len(text.split()) < 5:
        return False
    later = re.findall(r"[^\w'][\"(]?([A-Z][\w']*)", text)
    return all(word == "I" or word.startswith("I'") for word in later)


def chatterbot(wheel: Path) -> Iterator[str]:
    """Yield the questions in the English part of chatterbot-corpus."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if re.fullmatch(rf"chatterbot_corpus/data/english/({'|'.join(TOPICS)})\.yml", name):
                for conversation in yaml.safe_load(archive.read(name))["conversations"]:
                    yield str(conversation[0])


def chitchat(wheel: Path) -> Iterator[str]:
    """Yield the topics and questions of chitchat-dataset that make sense without their dialogue."""
    with zipfile.ZipFile(wheel) as archive:
        conversations = json.loads(archive.read("chitchat_dataset/dataset.json"))
    lines = []
    for identity in sorted(conversations):
        yield conversations[identity].get("prompt") or ""
        lines += [line["text"].strip() for group in conversations[identity]["messages"] for line in group]
    occurrences = Counter(word for line in lines for word in words(line))
    for line in lines:
        if stands_alone(line) and all(occurrences[word] >= COMMON for word in words(line)):
            yield line


def words(text: str) -> frozenset[str]:
    """Return the words of a text, without case and punctuation."""
    return frozenset(re.findall(r"[a-z0-9']+", text.lower()))


def unlike(prompts: Iterable[str]) -> list[str]:
    """Return the prompts that are not similar to an earlier one."""
    kept: list[frozenset[str]] = []
    holders: dict[str, list[int]] = defaultdict(list)
    result = []
    for prompt in prompts:
        own = words(prompt)
        shared: dict[int, int] = defaultdict(int)
        for word in own:
            for index in holders[word]:
                shared[index] += 1
        if not own or any(count / len(own | kept[index]) > SIMILAR for index, count in shared.items()):
            continue
        for word in own:
            holders[word].append(len(kept))
        kept.append(own)
        result.append(prompt)
    return result


def select(chatterbot_wheel: Path, chitchat_wheel: Path, count: int, seed: int = 0) -> list[str]:
    """Return ``count`` prompts, no two of them similar, in a fixed random order.

    Raises:
        ValueError: the collections do not have as many.
    """
    candidates = [*chatterbot(chatterbot_wheel), *chitchat(chitchat_wheel)]
    fit = unlike(prompt for text in candidates if (prompt := clean(text)) is not None)
    if len(fit) < count:
        raise ValueError(f"{count} prompts were requested, but there are only {len(fit)}")
    random.Random(seed).shuffle(fit)
    return fit[:count]
