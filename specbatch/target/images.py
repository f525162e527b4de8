"""Targets that can be trained on conversations with images. This is the only place that decides which."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specbatch.errors import UserError

if TYPE_CHECKING:
    from specbatch.config import Config
    from specbatch.target import TargetShape

WITH_IMAGES = ("Mistral3ForConditionalGeneration",)
"""Architectures for which it was shown that SGLang's expansion of images and the captured states are as planned."""


def check_images(config: Config, target: TargetShape) -> None:
    """Check that conversations with images can be trained, if ``data.images`` asks for them.

    Raises:
        UserError: they can't.
    """
    if not config.data.images:
        return
    if target.architecture not in WITH_IMAGES:
        raise UserError(
            f"data.images: true: the target {target.path} is a {target.architecture or 'model without a class'}, and "
            f"conversations with images can be trained only for {', '.join(WITH_IMAGES)}; leave data.images out to "
            "train on conversations of text"
        )
    if config.data.regenerate.answers or config.run.goal == "answers":
        raise UserError(
            "data.images: true: targets answer prompts without images only; leave data.images or data.regenerate out"
        )
