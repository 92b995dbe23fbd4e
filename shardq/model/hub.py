"""The folder of a model's files: a local one, or that of a hub name, which is downloaded first."""

import errno
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

from shardq.errors import CheckpointError, ConfigError, ShardQError, StorageError
from shardq.formats.checkpoint import COMPANIONS
from shardq.formats.shards import open_index

# In these patterns * matches slashes too: files in subfolders are not downloaded, except chat templates.
NEEDED = ("*.safetensors", "*.json", "README.md", *COMPANIONS)  # the card for its licence
OTHER_LAYOUTS = ("consolidated*", *(f"*/{pattern}" for pattern in NEEDED if not pattern.endswith(".jinja")))
PATTERNS = {"allow_patterns": list(NEEDED), "ignore_patterns": list(OTHER_LAYOUTS)}
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
ANSWER_SECONDS = 20.0


def local_folder(name: str, revision: str | None, say: Callable[[str], None]) -> Path:
    """Folder with the model's files; any other name is one of the hub, downloaded to the Hugging Face cache first.

    If the hub does not answer, a copy in the cache is used.

    Args:
        revision: branch, tag or commit of a hub name; None: the hub's main one.
        say: is given a line before anything is downloaded, and one where the cache's copy is used.

    Raises:
        CheckpointError: neither a folder nor a hub name that can be reached or is in the cache.
        ConfigError: a folder has no revisions.
        StorageError: the cache cannot be written.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ConfigError(
                f"revision: {revision} is asked for, but {name} is a folder, not a hub name; leave it out"
            )
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise CheckpointError(
            f"{name}: no such folder; --model takes a Hugging Face folder or a hub name (owner/model)"
        )
    cache, called = huggingface_hub.constants.HF_HUB_CACHE, f"{name} at {revision}" if revision else name
    try:
        HfApi().model_info(name, revision=revision, timeout=ANSWER_SECONDS)
        say(f"{called}: no folder here, so it comes from the hub; what is not yet in {cache} is downloaded")
        return Path(snapshot_download(name, revision=revision, **PATTERNS))
    except (HTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if kept := _kept(name, revision):
            say(f"{called}: the hub cannot provide it ({reason}); the copy in {cache} is used")
            return kept
        if getattr(error, "errno", None) in OF_THE_DISK:
            raise StorageError(f"{cache}: {error.strerror}; make room, or set HF_HOME to another folder") from error
        raise CheckpointError(
            f"{called}: no such folder, and the hub cannot provide it ({reason}); "
            "check the name and the network, or download it elsewhere and pass the folder"
        ) from error


def _kept(name: str, revision: str | None) -> Path | None:
    """The copy of a model in the cache, if it has all weights."""
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, **PATTERNS))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        folder = getattr(error, "snapshot_path", None)  # a snapshot that lacks a file that is asked for
    try:
        return Path(folder) if folder and open_index(Path(folder)) else None
    except ShardQError:
        return None
