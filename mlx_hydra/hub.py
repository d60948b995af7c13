"""Folders of models, on this machine or from the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from huggingface_hub import snapshot_download


def find_folder(
    option: str, path_or_repo: str, patterns: Sequence[str], revision: Optional[str] = None
) -> Path:
    """The folder that a user names with ``option``, fetched where it is a repository on the hub.

    Args:
        patterns: the files that are fetched.
        revision: branch, tag or commit of the repository.

    Raises:
        ValueError: a file, or neither a folder nor a name of a repository.
        OSError: the hub does not give the repository.
    """
    path = Path(path_or_repo).expanduser()
    where = f"{option} {path_or_repo or repr(path_or_repo)}"
    if path_or_repo and path.is_dir():
        if revision is not None:
            raise ValueError(f"--revision {revision}: {where} is a folder; expected a repository.")
        return path
    if path_or_repo and path.exists():
        raise ValueError(f"{where} is a file: expected the folder that it is in.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path_or_repo):
        raise ValueError(f"{where}: no such folder, and not a repository (owner/name) either.")
    try:
        return Path(snapshot_download(path_or_repo, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise OSError(f"{where}: no such folder, and the hub does not give it: {reason}") from error
