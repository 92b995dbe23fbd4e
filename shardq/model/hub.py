"""Where a model's files are: a local folder, or a hub name that is downloaded first."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from shardq.errors import CheckpointError

NEEDED_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "merges.txt", "LICENSE*")


def local_folder(name: str) -> Path:
    """Folder with the model's files; a hub name (`owner/model`) is downloaded to the Hugging Face cache first.

    Raises:
        CheckpointError: neither a folder nor a hub name that can be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local or Path(name).exists():
        raise CheckpointError(
            f"{name}: no such folder; --model takes a Hugging Face folder or a hub name (owner/model)"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(NEEDED_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name}: no such folder, and the hub cannot provide it ({reason}); "
            "check the name and the network, or download it elsewhere and pass the folder"
        ) from error
