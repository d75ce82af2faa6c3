"""The Hugging Face hub: the one module that imports `huggingface_hub`.

It reads HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE itself; no credential passes through here.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from tokenmill.errors import TokenizerError


class Fetched(NamedTuple):
    """A file of a repository."""

    path: Path
    """Of `tokenizer.json`, in the hub's local cache."""
    revision: str
    """The commit it belongs to."""


def fetch_tokenizer(name: str, revision: str | None) -> Fetched:
    """Download `tokenizer.json` and its configuration (cached by the hub library).

    Raises:
        TokenizerError: unknown, private, without `tokenizer.json`, or out of reach.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = Path(huggingface_hub.hf_hub_download(name, "tokenizer.json", revision=revision))
        commit = path.parent.name  # the cache keeps a file at snapshots/<commit>/<file>
        for companion in ("tokenizer_config.json", "special_tokens_map.json"):
            # Where the end-of-sequence token is named; a repository may have only one of them.
            with contextlib.suppress(EntryNotFoundError):
                huggingface_hub.hf_hub_download(name, companion, revision=commit)
    except LocalEntryNotFoundError:
        raise TokenizerError(
            f"tokenizer {name}: the hub cannot be reached and the file is not in the local cache",
            next_step="check the network (or HF_HUB_OFFLINE), or give a directory that holds tokenizer.json",
        ) from None
    except EntryNotFoundError:
        raise TokenizerError(
            f"tokenizer {name}: the repository has no tokenizer.json",
            next_step="convert it with transformers (AutoTokenizer, save_pretrained) and give that directory",
        ) from None
    except Exception as error:  # noqa: BLE001  # the client passes on whatever its transport raises
        raise TokenizerError(
            f"tokenizer {name}: the hub refused it: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            next_step="check the name; for a private or gated repository set HF_TOKEN; or give a local directory",
        ) from None
    return Fetched(path, commit)
