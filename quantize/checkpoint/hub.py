"""A model with an id is fetched from the hub, by the hub's own library, into its cache."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from quantize.checkpoint.files_seen import sha256
from quantize.checkpoint.paths import SIDE_FILES
from quantize.errors import QuantizeError, UsageError, reason

SHA256 = re.compile("[0-9a-f]{64}")


def download(name: str, revision: str | None = None) -> Path:
    """Fetch a model's config, tokenizer and safetensors files, and nothing else; what was interrupted goes on.

    A token is found as the hub's library finds it: `HF_TOKEN`, or what `hf auth login` stored.

    Args:
        name: the id.
        revision: a branch, a tag or a commit; None for the main branch.

    Raises:
        UsageError: the hub has no such model or revision, does not give it to this user, or cannot be reached.
        QuantizeError: a file is not what the hub says it is.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(name, revision):
        patterns = ["*.safetensors", *(f"*{suffix}" for suffix in sorted(SIDE_FILES))]
        found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    for path in sorted(found.glob("*.safetensors")):
        require_hash(path)
    return found


def require_on_hub(name: str, revision: str | None = None) -> None:
    """Check that the hub or its cache has a model, by its config alone.

    The hub is asked once: what fetches a file asks again for 23 seconds where there is no network, or the name is that
    of a directory and misspelt.

    Raises:
        UsageError: as `download`.
    """
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    with hub_errors(name, revision):
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), token=get_token())
        except EntryNotFoundError as error:  # the hub has the model, but no config of it
            if isinstance(error, LocalEntryNotFoundError):
                raise
        except (HfHubHTTPError, OSError, ValueError):
            raise
        except Exception as error:  # of the library's client for HTTP, which is another one in each of its versions
            raise ConnectionError from error


@contextlib.contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the hub about a model into one sentence each.

    Raises:
        UsageError: the hub has no such model or revision, does not give it to this user, or cannot be reached.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise UsageError(f"{name} is gated: accept its terms on the hub, and log in with `hf auth login`") from None
    except RevisionNotFoundError:
        raise UsageError(f"{name} has no revision {revision} on the hub; give a branch, a tag or a commit") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UsageError(
            f"{name} is no directory here, and the hub has no model of that id for you; if it is private, log in with "
            "`hf auth login`"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UsageError(f"{name} is no directory here, and {why(error)}") from None


def why(error: BaseException) -> str:
    """Say in half a sentence why the hub gives nothing, from an error or one of those behind it."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    codes = [getattr(getattr(link, "response", None), "status_code", None) for link in chain]
    code = next((code for code in codes if code is not None), None)
    if code == 401:
        return "the hub does not know your token; log in anew with `hf auth login`"
    if code == 429:
        return "the hub takes no more requests from you for now; wait some minutes, and start again"
    if code is not None:
        return f"the hub answers with the error {code}; start again later, and what was fetched is kept"
    if isinstance(error, OSError) and error.errno is not None and "etwork" not in str(error):
        return f"what is fetched cannot be stored ({reason(error)})"
    return "the hub cannot be reached to fetch it; give a model's directory"


def require_hash(path: Path) -> None:
    """Check that a large file in the hub's cache is what the hub says: its blob there is named by its SHA-256.

    Raises:
        QuantizeError: it is not.
    """
    blob = path.resolve()
    if SHA256.fullmatch(blob.name) and sha256(blob) != blob.name:
        raise QuantizeError(f"{path} has not the SHA-256 that the hub gives for it; remove {blob}, and fetch it again")
