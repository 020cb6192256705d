"""Models from the hub: whether they can be had, found out in seconds and before anything is loaded.

A complete copy in the hub's cache serves, and then nobody asks the hub. Nothing here imports PyTorch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError

REPOSITORIES = {
    "chatterbox": "ResembleAI/chatterbox",
    "multilingual": "ResembleAI/chatterbox",
    "turbo": "ResembleAI/chatterbox-turbo",
    "nano": "ResembleAI/chatterbox-nano",
}
CHECKPOINTS = {
    "chatterbox": ("ve.safetensors", "t3_cfg.safetensors", "s3gen.safetensors", "tokenizer.json", "conds.pt"),
    "multilingual": (
        "ve.pt",
        "t3_mtl23ls_v2.safetensors",
        "s3gen.pt",
        "grapheme_mtl_merged_expanded_v1.json",
        "conds.pt",
    ),
    "turbo": (
        "ve.safetensors",
        "t3_turbo_v1.safetensors",
        "s3gen_meanflow.safetensors",
        "tokenizer_config.json",
        "conds.pt",
    ),
    "nano": (
        "ve.safetensors",
        "t3_nano_v1.safetensors",
        "s3gen_meanflow.safetensors",
        "tokenizer_config.json",
        "conds.pt",
    ),
}
"""The files of Resemble AI's checkpoints."""
TRANSFORMER = (
    ("config.json",),
    ("preprocessor_config.json", "processor_config.json"),
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""The files of a model that transformers loads, each under the names that it may have."""
ANSWER_S = 5.0
"""A hub that takes longer to answer for one file is not there."""


def check_checkpoint(name: str, folder: str | Path | None) -> None:
    """Raises UserError if one of Resemble AI's checkpoints is neither in its folder nor in the cache nor on the hub."""
    files = CHECKPOINTS[name]
    if folder is not None:
        if lacks := [file for file in files if not (Path(folder) / file).is_file()]:
            raise UserError(
                f"pipeline.checkpoint_dir={folder} lacks {', '.join(lacks)}: "
                f"download the files of {name} there, or leave checkpoint_dir unset to use the hub"
            )
    elif reason := why_not(REPOSITORIES[name], [(file,) for file in files]):
        raise cannot_fetch(name, reason)


def cannot_fetch(name: str, reason: str) -> UserError:
    return UserError(
        f"pipeline={name}: the hub's {REPOSITORIES[name]} cannot be fetched ({reason}): connect, or set "
        "pipeline.checkpoint_dir to a folder that holds its files"
    )


def cached_checkpoint(name: str) -> Path | None:
    """Where the cache has the whole checkpoint, if it does."""
    return cached_folder(REPOSITORIES[name], [(file,) for file in CHECKPOINTS[name]])


def revision(name: str) -> str | None:
    """Which version of a checkpoint the cache holds or the hub would give; None where neither says."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if (folder := cached_checkpoint(name)) is not None:
        return folder.name  # snapshots are called by their commits
    try:
        return get_hf_file_metadata(hf_hub_url(REPOSITORIES[name], CHECKPOINTS[name][0]), timeout=ANSWER_S).commit_hash
    except Exception:  # whether it can be had is told elsewhere
        return None


def why_not(model: str, files: Sequence[Sequence[str]]) -> str | None:
    """Why a model's files cannot be had, from a local folder, the cache or the hub; None if they can.

    `model` is a folder or a repository's name; each of the files may have one of several names.
    """
    if Path(model).is_dir():
        lacks = [names[0] for names in files if not any((Path(model) / name).is_file() for name in names)]
        return f"the folder lacks {', '.join(lacks)}" if lacks else None
    if cached_folder(model, files):
        return None
    return _ask(model, files[0][0])


def cached_folder(repository: str, files: Sequence[Sequence[str]]) -> Path | None:
    """The folder of the cache that holds all of the files; None if one is missing there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        copies = [[try_to_load_from_cache(repository, name) for name in names] for names in files]
    except HFValidationError:  # a path that does not exist, for example
        return None
    paths = [next((copy for copy in one if isinstance(copy, str)), None) for one in copies]
    return None if None in paths else Path(str(paths[0])).parent


def _ask(repository: str, file: str) -> str | None:
    """What the hub says of one file, in one line; None if it has it."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the cache has no complete copy"
    answer = [f"{constants.ENDPOINT} did not answer within {ANSWER_S:g} s"]

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repository, file), token=os.getenv("HF_TOKEN"), timeout=ANSWER_S)
            answer[:] = []
        except Exception as error:  # of the network, of the hub, of the name: each says what is wrong
            answer[:] = [(str(error).strip() or type(error).__name__).splitlines()[0]]

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name knows no time limit
    asking.start()
    asking.join(ANSWER_S)
    return answer[0] if answer else None
