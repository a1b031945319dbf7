"""Models of the Hugging Face hub: found in the cache, or downloaded as safetensors."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lomo_jax.errors import UserError

# A name, its owner, and perhaps a revision: "Qwen/Qwen3-8B" or "Qwen/Qwen3-8B@main".
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_TEXT = (
    *("*.json", "*.jinja", "*.txt", "tokenizer.model"),
    *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_WEIGHTS = ("*.safetensors",)


def is_id(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is the id of a model on the hub, and not a file here."""
    path = str(path)
    return bool(_ID.fullmatch(path)) and not path.endswith(".gguf") and not os.path.exists(path)


def fetch(model_id: str, *, weights: bool) -> Path:
    """Returns the folder of a model in the cache, after downloading what it lacks.

    A download that was interrupted continues. Weights in other formats than safetensors are left
    out. The variables of huggingface_hub (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE) apply.

    Args:
      model_id: "owner/name" or "owner/name@revision".
      weights: Whether to download the weights too.

    Raises:
      UserError: The model does not exist, needs a login, or cannot be downloaded.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    name, _, revision = model_id.partition("@")
    patterns = [*_TEXT, *(_WEIGHTS if weights else ())]
    try:
        folder = hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated; accept its terms on its page of the hub, then run: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a folder here nor a model on the hub; correct the name, or run "
            "hf auth login if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{name} has no revision {revision!r}; correct it or leave it out"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{name} is neither a folder here nor in the cache, and the hub cannot be reached; "
            "correct the path, or go online"
        ) from None
    except Exception as error:  # the hub's client changes its transport, and with it the errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{name} cannot be downloaded ({reason}); the same command continues the download"
        ) from error
    return Path(folder)
