"""Upload of a finished export to the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from shardq.errors import ConfigError, StorageError
from shardq.rundir.folder import LOCK

NO_RIGHT = (401, 403)


def check_push(repository: str) -> None:
    """Check what can be without asking the hub.

    Raises:
        ConfigError: the repository's name is not well-formed, or there is no token.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub: {repository} is no name of a repository; give owner/name") from error
    if "/" not in repository:
        raise ConfigError(f"push_to_hub: {repository} names no owner; give owner/name")
    if get_token() is None:
        raise ConfigError("push_to_hub: there is no token for the hub; set HF_TOKEN, or log in with `hf auth login`")


def push(folder: Path, repository: str, private: bool, say: Callable[[str], None]) -> str:
    """Upload a folder, to a repository that is made where there is none; give its address.

    Raises:
        StorageError: the token has no right to write there, or the hub cannot be reached or refuses.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        say(f"{folder}: uploading to {address}")
        api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=[LOCK], commit_message="Quantized with shardq"
        )
    except (HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        said = (
            f"the token has no right to write there ({reason}); use one that has"
            if status in NO_RIGHT
            else f"the hub cannot be reached, or refuses ({reason}); check the network"
        )
        raise StorageError(
            f"push_to_hub: {repository}: {said}. The export in {folder} is whole, the same command uploads it"
        ) from error
    return address
