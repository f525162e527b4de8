"""Images of conversations: reads them, and expands their placeholders among tokens as SGLang does.

SGLang decodes the ids that it is sent, and has the target's own processor encode the text again together with the
images. The same is done here with the same processor, once, so that lengths and masks are known to the plan. A sample
whose text is encoded otherwise in this way is rejected.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec
import numpy as np
import xxhash

from specbatch.config import Config
from specbatch.corpus.conversation import Rejected
from specbatch.errors import UserError
from specbatch.target import locate, read_target
from specbatch.target.images import check_images


class ImageError(Exception):
    """An image can't be used; the message says which and why."""


class Image(msgspec.Struct, frozen=True):
    """An image of a prepared sample. Pixels are not part of prepared data."""

    source: str
    """Absolute path of a file, or a data URL."""
    digest: str
    """XXH3-64 hash of the encoded image, in hexadecimal."""
    first: int
    """Position of its first token in the sample."""
    tokens: int

    def url(self) -> str:
        """Return the image as a data URL.

        Raises:
            ImageError: it can't be read, or is not the one that was prepared.
        """
        content = read_image(self.source)
        if xxhash.xxh3_64_hexdigest(content) != self.digest:
            raise ImageError(
                f"{named(self.source)}: the image has changed since the data was prepared; restore it, or set another "
                "data.cache_dir to prepare the data again"
            )
        return f"data:;base64,{base64.b64encode(content).decode()}"


def read_image(source: str) -> bytes:
    """Return the encoded image of a file or a data URL.

    Raises:
        ImageError: it can't be read.
    """
    try:
        if not source.startswith("data:"):
            return Path(source).read_bytes()
        head, comma, body = source.partition(",")
        if not comma:
            raise ValueError("it has no comma")
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except (OSError, ValueError, binascii.Error) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{named(source)}: {why}") from error


def named(source: str) -> str:
    """Return the source of an image for messages: data URLs are cut."""
    return f"{source[:40]}..." if source.startswith("data:") and len(source) > 40 else source


def as_sent(ids: np.ndarray, images: Sequence[Image]) -> np.ndarray:
    """Return the tokens of a sample as an engine is sent them: with one token for each image, int ``[tokens]``."""
    kept = np.ones(len(ids), dtype=bool)
    for image in images:
        kept[image.first + 1 : image.first + image.tokens] = False
    return ids[kept]


class ImageExpander:
    """Expands the placeholders of a target's images.

    Raises:
        UserError: the target is not one of those with images, or its processor can't be loaded.
    """

    def __init__(self, config: Config) -> None:
        check_images(config, read_target(config.target.path))
        from transformers import AutoProcessor

        folder = locate(config.target.path)
        try:
            self._processor: Any = AutoProcessor.from_pretrained(
                folder, trust_remote_code=config.target.trust_remote_code, local_files_only=True
            )
            self._placeholder, self._end = self._processor.image_token_id, self._processor.image_end_token_id
        except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
            why = str(error).strip().partition("\n")[0]
            raise UserError(
                f"data.images: true: the image processor in {folder} cannot be loaded: {why}; it needs the target's "
                "processor files, and pillow and torchvision"
            ) from error
        self._adds_special = bool(self._processor.tokenizer.encode(""))

    def expand(
        self, ids: np.ndarray, mask: np.ndarray, sources: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, list[Image]]:
        """Return a sample with its images' tokens, which are never loss, and the images.

        Args:
            ids: int32 ``[tokens]``, with one placeholder for each image.
            mask: bool ``[tokens]``.

        Raises:
            Rejected: an image can't be read, or SGLang would compute other tokens.
        """
        places = np.flatnonzero(ids == self._placeholder)
        if len(places) != len(sources):
            raise Rejected(
                "other images than the chat template shows",
                f"{len(sources)} images, and {len(places)} places for one in the rendered text",
            )
        contents = [_content(source) for source in sources]
        expanded = self._encoded(ids, [_opened(*pair) for pair in zip(sources, contents, strict=True)])
        images: list[Image] = []
        pieces, masks, first, done = [], [], 0, 0
        for place, source, content in zip(places.tolist(), sources, contents, strict=True):
            start = done + place - first
            ends = np.flatnonzero(expanded[start:] == self._end)
            tokens = int(ends[0]) + 1 if len(ends) else 0
            images.append(Image(source, xxhash.xxh3_64_hexdigest(content), start, tokens))
            pieces += [ids[first:place], expanded[start : start + tokens]]
            masks += [mask[first:place], np.zeros(tokens, dtype=bool)]
            first, done = place + 1, start + tokens
        found = np.concatenate([*pieces, ids[first:]])
        if not np.array_equal(found, expanded) or not all(image.tokens for image in images):
            raise Rejected(
                "text with images that SGLang encodes otherwise",
                "it decodes the tokens and encodes the text again, which gives others",
            )
        return found, np.concatenate([*masks, mask[first:]]), images

    def _encoded(self, ids: np.ndarray, pictures: list[Any]) -> np.ndarray:
        """Return the tokens of a text with images as SGLang computes them, int32 ``[tokens]``."""
        tokenizer = self._processor.tokenizer
        text = tokenizer.decode(ids.tolist())
        # As SGLang does when the chat template wrote the token already.
        begun = self._adds_special and tokenizer.bos_token and text.startswith(tokenizer.bos_token)
        made = self._processor(
            text=[text], images=pictures, padding=True, **({"add_special_tokens": False} if begun else {})
        )
        return np.asarray(made["input_ids"], dtype=np.int32)[0]


def _content(source: str) -> bytes:
    try:
        return read_image(source)
    except ImageError as error:
        raise Rejected("an image that cannot be read", str(error)) from error


def _opened(source: str, content: bytes) -> Any:
    """Return an image as the processor gets it in SGLang."""
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(content)) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise Rejected("an image that cannot be read", f"{named(source)}: {error}") from error
