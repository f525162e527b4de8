"""EAGLE-3 as a `specbatch.drafts.base.Algorithm`."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from specbatch.drafts.base import Suggestion, Term
from specbatch.drafts.decoder_algorithm import DecoderAlgorithm
from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.drafts.eagle3.memory import Shape, rank_memory
from specbatch.drafts.sglang import layer_ids
from specbatch.errors import UserError
from specbatch.units import count_text

if TYPE_CHECKING:
    import numpy as np
    import torch

    from specbatch.corpus import Corpus
    from specbatch.drafts.eagle3.contract import Eagle3Contract
    from specbatch.drafts.eagle3.files import Eagle3Files
    from specbatch.drafts.eagle3.model import Eagle3Settings
    from specbatch.drafts.masks import Costs, Masks, SampleId
    from specbatch.drafts.pack import ContextShard


RENAMED = (
    'Trainers that call the layer `midlayer` load it under other names: `python -c "from safetensors.torch import '
    "load_file, save_file; save_file({n.replace('layers.0.', 'midlayer.'): t for n, t in "
    "load_file('DRAFT/model.safetensors').items()}, 'model.safetensors', {'format': 'pt'})\"`"
)


class Eagle3(DecoderAlgorithm):
    """EAGLE-3 for one configuration and target."""

    name = "eagle3"
    title = "EAGLE-3"
    section = Eagle3Draft
    default = True
    computed = "live columns"
    note = RENAMED
    changed_logits = True
    reads_images = True

    @cached_property
    def draft(self) -> Eagle3Draft:
        """The ``draft`` section of the configuration."""
        return cast(Eagle3Draft, self.config.draft)

    @cached_property
    def contract(self) -> Eagle3Contract:
        from specbatch.drafts.eagle3.contract import Eagle3Contract

        return Eagle3Contract(self._aux_layers(), self.target.hidden, self.config.data.images)

    @cached_property
    def shape(self) -> Shape:
        """The shape of the draft."""
        draft, target = self.draft, self.target
        return Shape(
            **self._layer_shape,
            draft_vocab=min(draft.vocab_size or target.vocab, target.vocab),
            aux_layers=len(self.contract.aux_layers),
            own_embedding=draft.train_embedding,
            train_head=draft.train_head,
            fc_norm=draft.fc_norm,
            norm_output=draft.norm_output,
            images=self.config.data.images,
        )

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        return tuple(Term(f"step {step}", step) for step in range(self.draft.ttt_steps))

    @classmethod
    def teaches(cls, loss_mask: np.ndarray) -> bool:
        from specbatch.drafts.eagle3.contract import has_targets

        return has_targets(loss_mask)

    def counts(self, masks: Masks) -> np.ndarray:
        from specbatch.drafts.eagle3.cost import counts_of

        return counts_of(masks, self.draft.ttt_steps)

    def shares(self, counts_T: np.ndarray) -> np.ndarray:
        import numpy as np

        return np.array([self.draft.step_decay**step for step in range(len(counts_T))])

    def costs(self, masks: Masks) -> Costs:
        from specbatch.drafts.eagle3.cost import costs_of

        return costs_of(masks, self.draft.ttt_steps, self.shape)

    def memory(self) -> dict[str, int]:
        return rank_memory(self.config, self.shape, self.draft.ttt_steps, self.target.dtype)

    def description(self) -> list[str]:
        shape = self.shape
        total = shape.first + shape.layer + shape.head
        return [
            f"{count_text(total)} parameters: {self.size.text()}, a vocabulary of {shape.draft_vocab:,}",
            *self.size.reasons,
        ]

    def suggestion(self, *, large: bool) -> Suggestion:
        size = self.size
        draft = replace(self.draft, aux_layers=list(self.contract.aux_layers))
        comments = {
            "ttt_steps": "unrolled steps of training-time test",
            "vocab_size": "the most frequent tokens of the answers",
            "aux_layers": "the draft reads the outputs of a low, a middle and a high layer",
        }
        if large:
            # As in the published drafts of Kimi-K2.5 and DeepSeek-V3.
            draft.ttt_steps = 4
        if size.reasons:
            draft.num_attention_heads, draft.num_key_value_heads = size.heads, size.kv_heads
            draft.head_dim, draft.intermediate_size = size.head_dim, size.intermediate
            same = size.heads == self.target.heads
            comments |= {
                "num_attention_heads": "the target's" if same else "not the target's: see below",
                "num_key_value_heads": "each costs memory when the draft is served",
                "head_dim": "the target's",
                "intermediate_size": "width of its MLP",
            }
        return Suggestion(draft, comments, size.reasons)

    def check(self) -> list[str]:
        from specbatch.drafts.vocabulary import check_vocabulary

        chosen = self.contract.aux_layers
        default = "leave it out for a low, a middle and a high one"
        if self.draft.aux_layers is not None:
            if len(chosen) != 3 or list(chosen) != sorted(set(chosen)):
                raise UserError(
                    f"draft.aux_layers: {list(chosen)}: {self.name} reads three distinct layers in ascending order; "
                    f"{default}"
                )
            self._check_readable(chosen, default)
        layer_ids(self.target.architecture, chosen)
        if self.draft.fc_norm and self.draft.train_embedding:
            raise UserError(
                "draft.fc_norm: true: SGLang keeps a trained embedding only of a draft that reads the target's layers "
                "as one state, and so can't normalise each of them; set draft.train_embedding: false"
            )
        if self.config.data.images and self.draft.train_embedding:
            raise UserError(
                "draft.train_embedding: true: servers give a draft the target's embeddings of prompts with images, not "
                "its own; leave draft.train_embedding or data.images out"
            )
        check_vocabulary(self.draft.vocab_size, self.target)
        return []

    def facts(self) -> dict[str, Any]:
        draft = self.draft
        return {
            "algorithm": draft.algorithm,
            "ttt_steps": draft.ttt_steps,
            "step_decay": draft.step_decay,
            "vocab_size": draft.vocab_size,
            "aux_layers": list(self.contract.aux_layers),
            **self.size.facts(self.target),
            "train_head": draft.train_head,
            "train_embedding": draft.train_embedding,
            # Only if they are set, so that snapshots from before these switches existed still match.
            **{name: True for name in ("fc_norm", "norm_output") if getattr(draft, name)},
            **({"loss": draft.loss} if draft.loss != "kl" else {}),
            **({"images": True} if self.config.data.images else {}),
        }

    @cached_property
    def files(self) -> Eagle3Files:
        from specbatch.drafts.eagle3.files import Eagle3Files

        return Eagle3Files(self.draft, self.target, self.shape, self.contract.aux_layers)

    def settings(self, corpus: Corpus) -> Eagle3Settings:
        from specbatch.drafts.eagle3.settings import settings

        return settings(self.config, self.draft, self.target, self.shape, corpus)

    def module(self) -> type[torch.nn.Module]:
        from specbatch.drafts.eagle3.model import Eagle3Module

        return Eagle3Module

    def share_rows(
        self, loss_mask: torch.Tensor, lengths: tuple[int, ...], samples: tuple[SampleId, ...], share: ContextShard
    ) -> dict[str, torch.Tensor]:
        from specbatch.drafts.eagle3.columns import lay_out

        layout = lay_out(loss_mask, lengths, self.draft.ttt_steps)
        rows = layout.rows(layout.divide(share.ranks)[share.rank])
        return {**rows, "embeds": rows["aux"]} if self.config.data.images else rows

    def _aux_layers(self) -> tuple[int, ...]:
        """Return the configured layers, else a low, a middle and a high one."""
        from specbatch.drafts.eagle3.contract import LEAST_LAYERS, default_aux_layers

        if self.draft.aux_layers is not None:
            return tuple(self.draft.aux_layers)
        try:
            return default_aux_layers(self.target.layers)
        except ValueError as error:
            raise UserError(
                f"draft.aux_layers: {self.name} reads three distinct layers below the last one, and the target "
                f"{self.target.path} has only {self.target.layers} layers; it takes a target of at least {LEAST_LAYERS}"
            ) from error
