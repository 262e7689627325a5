"""A model with an id is fetched from the hub."""

from __future__ import annotations

from pathlib import Path

from quantize.checkpoint.untrusted_files import SIDE_FILES
from quantize.errors import UsageError


def download(name: str) -> Path:
    """Fetch a model's config, tokenizer and safetensors files from the hub, and nothing else.

    Raises:
        UsageError: the hub has no such model, does not give it to this user, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        patterns = ["*.safetensors", *(f"*{suffix}" for suffix in sorted(SIDE_FILES))]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError:
        raise UsageError(f"{name} is gated: accept its terms on the hub, and log in with `hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UsageError(f"{name} is no directory here, and the hub has no model of that id for you") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        raise UsageError(
            f"{name} is no directory here, and the hub cannot be reached to fetch it; give a model's directory"
        ) from None
