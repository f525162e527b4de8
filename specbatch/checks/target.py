"""The target: its files can be read, its tokens have rows, and a draft can learn its logits and its images."""

from __future__ import annotations

import os

from specbatch.config import Config
from specbatch.drafts.base import Algorithm
from specbatch.errors import UserError
from specbatch.target import PLAIN, TargetShape, bias_name, embedding_name, head_name, locate, stored_head
from specbatch.tokenizer_ids import tokenizer_ids


def check_readable(config: Config) -> None:
    """Check that the target exists and that this process may read its files, which often fails where groups share
    models.

    Raises:
        UserError: it does not exist, or a file can't be read.
    """
    folder = locate(config.target.path)
    try:
        closed = sorted(path for path in folder.iterdir() if path.is_file() and not os.access(path, os.R_OK))
    except PermissionError as error:
        raise UserError(f"target.path: no permission to read {folder}; ask its owner for it") from error
    except OSError:
        return
    if closed:
        raise UserError(f"target.path: no permission to read {closed[0]}; ask its owner for it, or copy the target")


def check_vocabulary(shape: TargetShape) -> list[str]:
    """Check that each token of the tokenizer has a row in the embedding; warn of a head that SGLang would not use.

    Raises:
        UserError: a token has none.
    """
    warnings = []
    head_name(shape)
    stored = stored_head(shape)
    if shape.tied and stored and not shape.weights.same(stored, embedding_name(shape)):
        warnings.append(
            f"target.path: {shape.path} stores {stored}, which differs from its embedding, but config.json says "
            "tie_word_embeddings: true: SGLang uses the embedding as the head, and so does the training"
        )
    ids = tokenizer_ids(shape.path)
    beyond = {i: token for i, token in ids.items() if i >= shape.vocab}
    if beyond:
        named = ", ".join(f"{token} ({i})" for i, token in sorted(beyond.items())[:5])
        raise UserError(
            f"target.path: the tokenizer of {shape.path} has {len(beyond)} tokens that its embedding of {shape.vocab} "
            f"rows (vocab_size) has no row for: {named}; resize the embedding, or remove them from the tokenizer"
        )
    return warnings


def check_logits(algorithm: Algorithm) -> None:
    """Check that the algorithm's loss uses the logits that the target samples from.

    Raises:
        UserError: it does not.
    """
    target = algorithm.target
    if not algorithm.changed_logits and (target.logits != PLAIN or bias_name(target) is not None):
        raise UserError(
            f"draft.algorithm: {algorithm.name} does not support what {target.path} does to its logits after the head "
            "(a factor, a softcap or a bias); choose another algorithm"
        )


def check_reads_images(algorithm: Algorithm) -> None:
    """Check that the algorithm's drafts read images as servers give them, if there are any.

    Raises:
        UserError: they don't.
    """
    if algorithm.config.data.images and not algorithm.reads_images:
        raise UserError(
            f"data.images: true: drafts of draft.algorithm: {algorithm.name} are not trained on images; choose another "
            "algorithm, or leave data.images out"
        )
