"""Imports transformers for the processes that load a tokenizer, once for all of them.

torch is hidden from it meanwhile: importing torch takes most of the time, and a tokenizer does not need it. Other code,
such as that of a draft algorithm, can import torch afterwards.
"""

import os
import sys

# transformers otherwise says that models are not available without torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
sys.modules["torch"] = None  # type: ignore[assignment]
try:
    import transformers.models.auto.tokenization_auto  # noqa: F401
finally:
    del sys.modules["torch"]
