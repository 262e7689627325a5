"""A model directory's processor, which makes inputs of images and the text around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from quantize.checkpoint.tokenizer import readable

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def has_processor(directory: Path | None) -> bool:
    """Return whether a directory has a processor, or the part of one that takes images."""
    return directory is not None and any((directory / name).is_file() for name in PROCESSOR_FILES)


def load_processor(directory: Path) -> Any:
    """Load the processor of a directory, or its image processor if there is no tokenizer; code there is never run.

    Raises:
        QuantizeError: it cannot be read, or needs a package that is not installed.
    """
    with readable(directory, "processor"):
        return AutoProcessor.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
