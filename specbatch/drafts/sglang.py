"""SGLang's names for the features that drafts need."""

from __future__ import annotations

from collections.abc import Sequence

from specbatch.errors import UserError

CAPTURE_ALGORITHM = "EAGLE3"
"""The ``speculative_algorithm`` that makes SGLang keep the outputs of chosen layers; no draft is loaded."""
CHAIN_ALGORITHM = "EAGLE3"
"""The ``speculative_algorithm`` that `specbatch.inference.chain_drafting` runs on a CPU."""
BLOCK_ALGORITHM = "DFLASH"
"""The ``speculative_algorithm`` that `specbatch.inference.block_drafting` runs on a CPU."""
CPU_ALGORITHMS = (CHAIN_ALGORITHM, BLOCK_ALGORITHM)
"""Every ``speculative_algorithm`` that SGLang can decode with on a machine without an accelerator."""
COUNTS_INPUTS = frozenset(
    {
        "DeepseekV2ForCausalLM",
        "DeepseekV32ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "GlmMoeDsaForCausalLM",
        "KimiK25ForConditionalGeneration",
        "MistralLarge3ForCausalLM",
    }
)
"""Targets whose class in SGLang interprets a layer's id as the output of that layer only if the first of all ids is 1,
and otherwise as its input."""

CAPTURE_METHOD = "set_eagle3_layers_to_capture"
"""Method of SGLang's classes that provide the states of chosen layers, for every draft algorithm."""
DELEGATING = ("Mistral3ForConditionalGeneration",)
"""Targets whose class in SGLang lacks that method; specbatch's plugin delegates it to the language model inside."""
REPAIRED = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", *DELEGATING)
"""Targets whose class in SGLang provides the outputs of layers only with specbatch's plugin (`inference.gemma3`,
`inference.class_repairs`)."""


def layer_ids(architecture: str, outputs: Sequence[int]) -> list[int]:
    """Return the ids by which SGLang's class for a target keeps the outputs of these layers.

    Args:
        architecture: architecture that the target's config.json names.
        outputs: decoder layers from 0, ascending.

    Raises:
        UserError: there are no such ids.
    """
    if architecture not in COUNTS_INPUTS or outputs[0] == 1:
        return list(outputs)
    if outputs[0] == 0:
        raise UserError(
            f"draft.aux_layers: SGLang's class for {architecture} does not provide the output of layer 0; begin with 1"
        )
    return [layer + 1 for layer in outputs]


def outputs_of(architecture: str, ids: Sequence[int]) -> list[int]:
    """Return the layers whose outputs SGLang keeps for these ids: the inverse of `layer_ids`."""
    return [layer - 1 for layer in ids] if architecture in COUNTS_INPUTS and ids[0] != 1 else list(ids)
