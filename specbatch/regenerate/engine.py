"""An engine that answers prompts: claims prompts, has conversations with the target, and delivers the answers.

It has no state that others need: when it dies, others answer its prompts. It leaves when the dispatcher says so.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from specbatch.config import Config, load_config
from specbatch.dispatch.client import Client, DispatcherGone
from specbatch.dispatch.connection_file import wait_for
from specbatch.dispatch.messages import Answer, Phase, Prompt
from specbatch.inference.arguments import start_timeout_s
from specbatch.inference.engine_loop import EngineLoop
from specbatch.inference.server import EngineError, RequestRefused
from specbatch.pack_manifest import PackId
from specbatch.regenerate.shards import finished
from specbatch.regenerate.speaker import Question, Said, Speaker
from specbatch.regenerate.voices import Endpoint, OwnEngine
from specbatch.rundir import RunDir
from specbatch.target import read_target

logger = logging.getLogger(__name__)

RENDEZVOUS_TIMEOUT_S = 600.0
LEFT = "left"
"""State of an engine that has received that it may leave."""
POLL_S = 0.2
PAUSE_S = 2.0
"""Seconds before a broken endpoint is used again, times the number of failures."""
MOST_AT_ONCE = 64
"""Most answers in one message."""


def main(run_dir: RunDir, attempt: int, task: int) -> None:
    """Answer prompts until all are answered or the attempt ends.

    Raises:
        RunError: the engine can't be kept alive, or the dispatcher is gone.
    """
    try:
        with joined(run_dir, attempt, f"engine-{task}", run_dir.component_log(attempt, "engine", task)) as engine:
            engine.run()
    except DispatcherGone:
        # The attempt may have ended with all prompts answered when this engine was restarted.
        if not finished(run_dir, load_config(run_dir.config)):
            raise


@contextlib.contextmanager
def joined(run_dir: RunDir, attempt: int, name: str, log: Path) -> Iterator[AnswerEngine]:
    """Provide an engine of an attempt, ready to run. Arguments and errors as for
    `specbatch.inference.engine.joined`."""
    config = load_config(run_dir.config)
    rendezvous = wait_for(run_dir.rendezvous(attempt), attempt, RENDEZVOUS_TIMEOUT_S, "prompts")
    with contextlib.closing(Client(rendezvous)) as client:
        yield AnswerEngine(config, Speaker(config), client, name=f"{name}-{secrets.token_hex(2)}", log=log)


class AnswerEngine(EngineLoop):
    """An engine around a source of the target's answers.

    Args:
        name: unique among all engines, earlier ones included.
        log: SGLang's log file.
    """

    result = "an answer"

    def __init__(self, config: Config, speaker: Speaker, client: Client, *, name: str, log: Path) -> None:
        super().__init__(config, client, name=name, log=log)
        self.speaker = speaker
        size = config.data.regenerate.batch_size
        self._slots = threading.Semaphore(size)
        # So that the target has as many questions as it can take, even while some answers are rendered and compared.
        self._workers = size + size // 4 + 1
        self._claimed: dict[int, PackId] = {}
        self._computed = 0
        self._voice: OwnEngine | Endpoint | None = None

    def run(self) -> None:
        """Work until the dispatcher says that this engine may leave. Raises the same as `EngineLoop.run`."""
        if self.client.status().phase is not Phase.WORK:
            logger.info("no engine is needed")
            return
        super().run()

    def _part(self) -> None:
        """Return claims and report that the engine leaves, instead of waiting for heartbeats to lapse."""
        self._give_back(self._called_away or "the engine leaves")
        self.client.heartbeat(self.name, [], LEFT)

    def _serve(self) -> str | None:
        if self.config.data.regenerate.endpoint:
            voice: OwnEngine | Endpoint = Endpoint(self.config)
        else:
            timeout_s = start_timeout_s(self.config, read_target(self.config.target.path))
            voice = OwnEngine(self.config, self.log, self.speaker.max_tokens, timeout_s)
        self._voice = voice
        done = SimpleQueue[Answer | str]()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="talk")
        try:
            with voice, self._claiming(self._idle, lambda most, broken: self._claim(most, voice, pool, broken, done)):
                return self._hand_over(voice, done)
        finally:
            # Unfinished answers end with the server.
            pool.shutdown(cancel_futures=True)

    def _claims(self) -> dict[int, PackId]:
        return self._claimed

    def _tokens(self) -> int:
        return self._computed

    def _drop(self, claim: int) -> bool:
        return self._claimed.pop(claim, None) is not None

    def _stop_start(self) -> None:
        if self._voice is not None:
            self._voice.stop()

    def _before_restart(self, why: str) -> None:
        """Give an endpoint time to recover."""
        if self.config.data.regenerate.endpoint:
            self._leaving.wait(PAUSE_S * self._restarts)

    def _hand_over(self, voice: OwnEngine | Endpoint, done: SimpleQueue[Answer | str]) -> str | None:
        """Report answers until the engine may leave, or breaks."""
        while not self._leaving.is_set():
            found = _some_of(done)
            answers = [answer for answer in found if isinstance(answer, Answer)]
            with self._lock:
                kept = [answer for answer in answers if answer.claim in self._claimed]
            if kept:
                self.client.answered(self.name, kept)
                with self._lock:
                    for answer in kept:
                        self._claimed.pop(answer.claim, None)
                        self._suspects.discard(answer.prompt)
                        self._computed += answer.tokens
                self._restarts = 0
                self._room.set()
            broke = next((why for why in found if isinstance(why, str)), None)
            if broke is not None:
                return broke
            if not voice.alive():
                return "its process ended"
        return None

    def _idle(self) -> int:
        with self._lock:
            return self._workers - len(self._claimed)

    def _claim(
        self,
        most: int,
        voice: OwnEngine | Endpoint,
        pool: ThreadPoolExecutor,
        broken: threading.Event,
        done: SimpleQueue[Answer | str],
    ) -> Phase:
        """Claim prompts and start to answer them."""
        answer = self.client.claim_prompts(self.name, most)
        with self._lock:
            self._claimed.update({prompt.claim: prompt.prompt for prompt in answer.granted})
        for prompt in answer.granted:
            if not broken.is_set():
                pool.submit(self._guarded, partial(self._talk, prompt, voice, broken, done))
        return answer.phase

    def _talk(
        self, prompt: Prompt, voice: OwnEngine | Endpoint, broken: threading.Event, done: SimpleQueue[Answer | str]
    ) -> None:
        """Have one conversation, in a separate thread."""
        if broken.is_set():
            return
        try:
            done.put(self.speaker.answer(prompt, _Slotted(voice, self._slots)))
        except RequestRefused as error:
            detail = f"{prompt.place}: {error}"
            done.put(Answer(prompt.claim, prompt.prompt, reason="refused by the engine", detail=detail))
        except EngineError as error:
            done.put(str(error))


class _Slotted:
    """A voice with a limited number of simultaneous questions."""

    def __init__(self, voice: OwnEngine | Endpoint, slots: threading.Semaphore) -> None:
        self._voice, self._slots = voice, slots

    def say(self, question: Question) -> Said:
        with self._slots:
            return self._voice.say(question)


def _some_of(done: SimpleQueue[Answer | str]) -> list[Answer | str]:
    """Return available results, after at most `POLL_S`."""
    found: list[Answer | str] = []
    try:
        found.append(done.get(timeout=POLL_S))
        while len(found) < MOST_AT_ONCE:
            found.append(done.get_nowait())
    except Empty:
        pass
    return found
