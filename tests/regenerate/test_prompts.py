"""Each prompt is answered once, whatever dies, and memory does not grow with the input."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from specbatch.dispatch.claims import SILENT_HEARTBEATS
from specbatch.dispatch.messages import (
    Answer,
    Answered,
    Claim,
    Done,
    Drain,
    Failed,
    Fault,
    Heartbeat,
    Phase,
    Prompt,
    Prompts,
    Refused,
    Report,
    Wait,
)
from specbatch.pack_manifest import PackId
from specbatch.regenerate.prompts import PromptDispatcher
from specbatch.regenerate.rows import InputRow

BEAT_S = 1.0


class Scene:
    """A dispatcher of ``count`` prompts, its clock, and what it kept."""

    def __init__(self, count: int) -> None:
        self.kept: list[Answer] = []
        self.now, self.read = 0.0, 0
        self.full = False
        self.dispatcher = PromptDispatcher(self._rows(count), self._keep, total=count, done=0, heartbeat_s=BEAT_S)

    def _rows(self, count: int) -> Iterator[tuple[PackId, InputRow]]:
        for number in range(1, count + 1):
            self.read = number
            yield (number, 0), InputRow(number, f"in:{number}", b"{}")

    def _keep(self, answer: Answer) -> None:
        if self.full:
            raise OSError("no space left")
        self.kept.append(answer)

    def claim(self, engine: str, most: int) -> list[Prompt]:
        reply = self.dispatcher.handle(Claim(engine, most), self.now, last=True)
        assert isinstance(reply, Prompts)
        return list(reply.granted)

    def answer(self, engine: str, *prompts: Prompt) -> object:
        answers = tuple(Answer(prompt.claim, prompt.prompt, b"{}") for prompt in prompts)
        return self.dispatcher.handle(Answered(engine, answers), self.now)

    def report(self) -> Report:
        return self.dispatcher.report(self.now)


def numbers(prompts: list[Prompt]) -> list[int]:
    return [prompt.prompt[0] for prompt in prompts]


def test_prompts_go_out_in_order_and_an_engine_that_died_is_replaced_first() -> None:
    scene = Scene(6)
    assert numbers(scene.claim("a", 2)) == [1, 2]
    assert numbers(scene.claim("b", 2)) == [3, 4]
    scene.now = SILENT_HEARTBEATS * BEAT_S + 0.1
    scene.dispatcher.handle(Heartbeat("b", (3, 4), "ready"), scene.now - 0.05)
    scene.dispatcher.tick(scene.now)
    assert numbers(scene.claim("b", 3)) == [1, 2, 5]
    assert scene.report().claimed == 5


def test_what_is_said_late_or_twice_is_not_kept() -> None:
    scene = Scene(2)
    (late,) = scene.claim("a", 1)
    scene.dispatcher.handle(Failed("a", late.claim, "the engine broke", Fault.OTHER), scene.now)
    scene.now = 2.0
    scene.dispatcher.tick(scene.now)
    (again,) = scene.claim("b", 1)
    assert again.prompt == late.prompt
    assert isinstance(scene.answer("a", late), Done)
    assert scene.kept == []
    scene.answer("b", again)
    scene.answer("b", again)
    assert [answer.prompt for answer in scene.kept] == [again.prompt]


def test_a_prompt_that_breaks_engines_gets_no_answer_and_says_why() -> None:
    scene = Scene(1)
    for engine in ("a", "b"):
        (prompt,) = scene.claim(engine, 1)
        scene.dispatcher.handle(Failed(engine, prompt.claim, "it broke", Fault.PACK), scene.now)
        scene.now += 2
    assert [(answer.reason, answer.detail) for answer in scene.kept] == [
        ("no engine could answer it", "a: it broke; b: it broke")
    ]
    assert scene.dispatcher.phase is Phase.WORK  # it is not known yet whether there are more
    scene.claim("a", 1)
    assert scene.dispatcher.phase is Phase.TRAINED


def test_a_drained_attempt_hands_out_nothing_and_still_takes_answers() -> None:
    scene = Scene(4)
    given = scene.claim("a", 2)
    scene.dispatcher.handle(Drain("Ctrl-C"), scene.now)
    assert scene.claim("a", 2) == []
    scene.answer("a", *given)
    assert (scene.report().step, scene.report().phase, scene.report().why) == (2, Phase.STOP, "Ctrl-C")


def test_answers_that_cannot_be_written_end_the_attempt_and_are_not_taken_for_kept() -> None:
    scene = Scene(2)
    given = scene.claim("a", 1)
    scene.full = True
    assert isinstance(scene.answer("a", *given), Refused)
    assert (scene.report().step, scene.report().error) == (0, "answers can't be written: no space left")


def test_trainers_are_told_that_there_are_no_packs_here() -> None:
    assert isinstance(Scene(1).dispatcher.handle(Wait(0, ((0, 0),)), 0.0), Refused)


@pytest.mark.parametrize("seed", range(20))
def test_every_prompt_is_kept_once_whoever_dies_and_little_is_held(seed: int) -> None:
    rng, scene = random.Random(seed), Scene(300)
    held: dict[str, list[Prompt]] = {}
    names = 0
    while scene.dispatcher.phase is Phase.WORK:
        scene.now += rng.random() * BEAT_S / 2
        if len(held) < 3:
            names += 1
            held[f"engine-{names}"] = []
        engine = rng.choice(list(held))
        event = rng.random()
        if event < 0.05:
            del held[engine]  # killed; it may have had an answer ready
            continue
        if event < 0.5:
            held[engine] += scene.claim(engine, rng.randint(1, 8))
        else:
            rng.shuffle(held[engine])
            count = rng.randint(0, len(held[engine]))
            scene.answer(engine, *held[engine][:count])
            del held[engine][:count]
        for name, prompts in held.items():
            beat = scene.dispatcher.handle(
                Heartbeat(name, tuple(prompt.claim for prompt in prompts), "ready"), scene.now
            )
            revoked = getattr(beat, "revoked", ())
            held[name] = [prompt for prompt in prompts if prompt.claim not in revoked]
        scene.dispatcher.tick(scene.now)
        assert scene.report().claimed + scene.report().free == scene.read - len(scene.kept)
    assert Counter(answer.prompt for answer in scene.kept) == {(number, 0): 1 for number in range(1, 301)}
    assert not scene.dispatcher._window.entries
    assert not scene.dispatcher._window.rows
