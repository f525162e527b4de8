"""The interface of a draft algorithm. The rest of specbatch knows nothing else about drafts.

Plan, dispatcher, engines, store, trainer, recordings, planner, export and evaluation ask an `Algorithm` for the
captured tensors and their rows (`CaptureContract`), the terms of its loss and how many positions of a sample enter each
of them, its cost, its checks, its files, and the module that is trained. A new algorithm is a subclass of `Algorithm`
that an entry point of the group ``specbatch.drafts`` names; nothing else in specbatch changes.

Nothing here imports torch or numpy, so that programs that only read a configuration start fast.

Shapes: ``S`` samples, ``T`` terms of the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

if TYPE_CHECKING:
    import numpy as np
    import torch

    from specbatch.config import Config, Draft
    from specbatch.corpus import Corpus
    from specbatch.drafts.masks import Costs, Masks, SampleId
    from specbatch.drafts.pack import ContextShard, PackTensors
    from specbatch.target import TargetShape

BYTES_PER_VALUE = 2
"""Bytes of a value of the hidden states: bfloat16."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that is captured from the target."""

    layers: tuple[int, ...] | None
    """Decoder layers, from 0, ascending, whose outputs are concatenated; None means the states after the final norm. No
    layers means the embeddings that the first layer reads: those of tokens, and of parts of images."""
    width: int
    """Values per row."""


class CaptureContract(ABC):
    """Which tensors of the target an algorithm reads, and at which positions of a sample."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorSpec]:
        """The tensors by name, in the order in which they are stored. At least one is made of layers."""

    @abstractmethod
    def rows(self, loss_mask: np.ndarray) -> dict[str, np.ndarray]:
        """Return the positions of a sample whose rows are stored. This is the only place that defines the mask rule.

        Args:
            loss_mask: bool ``[tokens]``.

        Returns:
            int64 ``[rows]`` for each tensor, ascending; all empty if the sample has nothing to learn.
        """

    @property
    def widths(self) -> dict[str, int]:
        """Values per row of each tensor."""
        return {name: spec.width for name, spec in self.tensors.items()}

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that any tensor is made of, ascending."""
        return tuple(sorted({layer for spec in self.tensors.values() for layer in spec.layers or ()}))

    @property
    def final(self) -> str | None:
        """Name of the tensor with the states after the final norm, from which the target's choices are computed."""
        return next((name for name, spec in self.tensors.items() if spec.layers is None), None)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a position if each tensor has a row for it."""
        return BYTES_PER_VALUE * sum(self.widths.values())

    def bytes(self, loss_mask: np.ndarray) -> int:
        """Return the bytes that a sample occupies in the store."""
        return sum(BYTES_PER_VALUE * self.widths[name] * rows.size for name, rows in self.rows(loss_mask).items())


@dataclass(frozen=True)
class Term:
    """A part of the loss that is counted and reported separately."""

    name: str
    """Name for people: ``step 0``, ``slot 3``, ``confidence 1``."""
    position: int | None
    """The proposed token that the term is about, from 0; None if it is about none."""


@dataclass(frozen=True)
class Suggestion:
    """The ``draft`` section of a first configuration, as ``specbatch init`` writes it."""

    draft: Draft
    comments: Mapping[str, str]
    """The comment of each written field, in the order in which they are written."""
    notes: tuple[str, ...] = ()
    """Comment lines below the fields."""


class Module(Protocol):
    """The trained module: a ``torch.nn.Module`` with these methods, and with parameters named as engines load them.

    The target's tensors that it reads are attached, not owned: snapshots don't contain them.
    """

    group: Any
    """The process group of the ranks that train a pack together; None if packs are not shared."""
    calibrated: tuple[str, ...]
    """Tensors of the contract whose scale `calibrate` needs."""

    def initialize(
        self,
        seed: int,
        embedding: torch.Tensor,
        target_head: torch.Tensor,
        start: Mapping[str, torch.Tensor] | None = None,
        target_bias: torch.Tensor | None = None,
    ) -> None:
        """Initialize the weights, the same for every number of ranks, and attach the target's tensors.

        Args:
            embedding, target_head: ``[vocabulary, hidden]``.
            start: weights to use instead, by name.
            target_bias: bias of the target's head, ``[vocabulary]``, if it has one; None for algorithms without
                `Algorithm.changed_logits`.
        """

    def calibrate(self, mean_square: Mapping[str, torch.Tensor]) -> None:
        """Adapt new weights to the scale of the target's states.

        Args:
            mean_square: float64 ``[width]`` of each tensor in `calibrated`, over the packs of the first step.
        """

    def forward(self, pack: PackTensors, weights: torch.Tensor) -> torch.Tensor:
        """Return the loss of a pack, or of this rank's share of it.

        Args:
            weights: factor of each term's sum, float32 ``[T]``.

        Returns:
            float ``[2, T]``: the weighted sums, and how often the draft was right. Only the sum of the first row may be
            differentiated.
        """

    def evaluate(self, pack: PackTensors, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute `forward` without gradient, and the proposals of greedy drafting.

        Returns:
            the result of `forward`; and int64 ``[proposals, tokens]``: the target's id of the token that drafting from
            the newest token at each position proposes for the first, second, ... position after it; -1 if unknown.
        """


class Files(Protocol):
    """How an algorithm's drafts are stored on disk, and how engines serve them."""

    def checkpoint(self, stored: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint, each checked.

        Args:
            stored: the draft's tensors of a snapshot.
            where: the snapshot, for messages.

        Raises:
            RunError: a tensor is missing, unknown, not finite, or has another shape.
        """

    def hf_config(self, tensors: Mapping[str, torch.Tensor], *, target_name: str, draft_tokens: int) -> dict[str, Any]:
        """Return config.json of a checkpoint.

        Args:
            tensors: tensors of the checkpoint.
            target_name: path or hub name under which a reader finds the target.
            draft_tokens: tokens to propose at a time unless the server sets another number.
        """

    def read_published(self) -> Any:
        """Read and check the draft on disk that a run starts from (``draft.init_from``); the result has ``warnings``.

        Raises:
            UserError: there is none, or this run can't continue with it.
        """

    def starting_tensors(self, published: Any, settings: Any, target_head: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the weights to start with, by name, for a draft with these settings."""

    def serve(self, engine: str, draft_tokens: int) -> dict[str, Any] | None:
        """Return the options that an engine needs besides the draft's directory.

        Args:
            engine: ``sglang`` for arguments of its server; ``vllm`` for keys of its ``--speculative-config``.

        Returns:
            None if the engine does not serve such drafts.
        """


class Algorithm(ABC):
    """A draft algorithm, for one configuration and target."""

    name: ClassVar[str]
    """Name in ``draft.algorithm``."""
    title: ClassVar[str]
    """Name for people."""
    section: ClassVar[type[Draft]]
    """The ``draft`` section of a configuration: a dataclass that adds the algorithm's fields to `Draft`. Its default of
    ``algorithm`` is the algorithm's name."""
    default: ClassVar[bool] = False
    """Whether this algorithm is used if a configuration names none."""
    computed: ClassVar[str]
    """The things that `Costs.computed_TS` counts, for people."""
    note: ClassVar[str] = ""
    """Markdown: the last paragraph of the model card about the draft's files."""
    changed_logits: ClassVar[bool] = False
    """Whether it can learn from targets whose logits are scaled, capped or biased (`specbatch.target.Logits`). If not,
    such targets are refused before anything starts."""
    reads_images: ClassVar[bool] = False
    """Whether it can learn from conversations with images (``data.images``). If not, they are refused before anything
    starts."""

    def __init__(self, config: Config, target: TargetShape) -> None:
        self.config, self.target = config, target

    @property
    @abstractmethod
    def contract(self) -> CaptureContract:
        """What is captured from the target."""

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The terms of the loss."""

    @property
    def proposals(self) -> int:
        """Tokens that a draft is trained to propose at a time."""
        return 1 + max(term.position for term in self.terms if term.position is not None)

    @classmethod
    @abstractmethod
    def teaches(cls, loss_mask: np.ndarray) -> bool:
        """Return whether a sample with this mask can enter the loss at all; others are left out of a corpus.

        Args:
            loss_mask: bool ``[tokens]``.
        """

    @abstractmethod
    def counts(self, masks: Masks) -> np.ndarray:
        """Return the number of positions of each sample that enter each term, int64 ``[T, S]``. It depends only on
        masks, sample ids and configuration, so every rank knows all denominators of a step."""

    @abstractmethod
    def shares(self, counts_T: np.ndarray) -> np.ndarray:
        """Return the factor of each term's mean over a step in the loss, float64 ``[T]``.

        Args:
            counts_T: positions of the whole step in each term, int64.
        """

    @abstractmethod
    def costs(self, masks: Masks) -> Costs:
        """Return the cost of capturing and training samples."""

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """Return the bytes that a trainer rank needs on its GPU at its peak, by kind, for a full pack of only loss
        tokens."""

    def description(self) -> list[str]:
        """Return lines that describe the draft's size, for ``specbatch plan``."""
        return []

    def suggestion(self, *, large: bool) -> Suggestion:
        """Return what ``specbatch init`` writes into the ``draft`` section.

        Args:
            large: whether the target has several hundred GiB.
        """
        return Suggestion(self.config.draft, {})

    @abstractmethod
    def check(self) -> list[str]:
        """Check the configuration against the target, before anything starts.

        Returns:
            warnings.

        Raises:
            UserError: the configuration can't work with this target.
        """

    def check_corpus(self, corpus: Corpus) -> list[str]:
        """Check the prepared corpus. Returns and raises the same as `check`."""
        return []

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return the facts that must be the same when training continues from a snapshot."""

    @property
    @abstractmethod
    def files(self) -> Files:
        """The files of the algorithm's drafts."""

    @abstractmethod
    def settings(self, corpus: Corpus) -> Any:
        """Return the picklable settings that a module is built from. Their ``draft_ids`` are the target's ids of the
        draft's vocabulary."""

    @abstractmethod
    def module(self) -> type[torch.nn.Module]:
        """Return the class of the trained module (`Module`), which is constructed from `settings`."""

    @abstractmethod
    def share_rows(
        self, loss_mask: torch.Tensor, lengths: tuple[int, ...], samples: tuple[SampleId, ...], share: ContextShard
    ) -> dict[str, torch.Tensor]:
        """Return the rows of each tensor that a rank reads of a pack that several ranks train: int64, ascending.

        Args:
            loss_mask: bool ``[tokens]`` of all samples, on the host.
        """


def algorithm_of(config: Config, target: TargetShape) -> Algorithm:
    """Return the algorithm that a configuration names, for its target.

    Raises:
        UserError: there is no such algorithm.
    """
    from specbatch.config.algorithms import algorithm_class

    return cast(type[Algorithm], algorithm_class(config.draft.algorithm))(config, target)
