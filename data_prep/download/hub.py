"""ImageNet from the Hugging Face Hub: the parquet files of the gated dataset ILSVRC/imagenet-1k.

huggingface_hub downloads, at one revision of the dataset, with the user's token, through Xet where that is
used. It resumes within a run. Between runs it keeps whole files only: what came of a file that broke off,
about 0.5 GB at most, is deleted (every attempt has a temporary file of its own). The SHA-256 that the Hub
publishes of each file, which the client does not compare, is compared here. `HF_ENDPOINT` redirects it.
"""

from __future__ import annotations

import errno
import functools
import inspect
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.download.room import byte_bar
from data_prep.download.transfer import RemoteFile, publish
from data_prep.storage import sha256_file

REPOSITORY = "ILSVRC/imagenet-1k"
PAGE = f"https://huggingface.co/datasets/{REPOSITORY}"
ATTEMPTS = 5  # for a file, over those that the client makes itself
WAIT_SECONDS = 2.0  # before the second; doubles


def remote_files(work: Path, with_test: bool = False) -> list[RemoteFile]:
    """The dataset's parquet files; `work` is a folder for what is on its way, on the disk of the targets.

    Raises:
        RuntimeError: huggingface_hub is missing, or the Hub refuses or does not answer.
    """
    hub = _hub_module()
    hub.utils.logging.set_verbosity_error()  # its warnings print signed addresses
    # A killed client leaves its temporary files, which no later one takes up.
    shutil.rmtree(work, ignore_errors=True)
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))

    def list_files() -> tuple[str, list[Any]]:
        revision = str(api.dataset_info(REPOSITORY).sha)
        return revision, list(api.list_repo_tree(REPOSITORY, "data", repo_type="dataset", revision=revision))

    revision, entries = _repeat(list_files, "listing the dataset")
    files = [
        RemoteFile(
            entry.path,
            entry.size,
            entry.lfs.sha256 if entry.lfs else None,
            functools.partial(_fetch, entry.path, revision, entry.lfs.sha256 if entry.lfs else None, work),
        )
        for entry in entries
        if entry.path.endswith(".parquet") and (with_test or not entry.path.startswith("data/test-"))
    ]
    if not files:
        raise RuntimeError(f"{REPOSITORY} has no data/*.parquet: see {PAGE}")
    print(f"{REPOSITORY} at {revision}" + ("" if with_test else ", without its unlabelled test split"))
    return files


def _fetch(name: str, revision: str, sha256: str | None, work: Path, target: Path, label: str) -> None:
    hub = _hub_module()
    settings: dict[str, Any] = {}
    # A progress bar of our own where the client takes one (1.0 did not).
    if "tqdm_class" in inspect.signature(hub.hf_hub_download).parameters:
        settings["tqdm_class"] = _bar_class(label)
    path = _repeat(
        lambda: hub.hf_hub_download(
            REPOSITORY,
            name,
            repo_type="dataset",
            revision=revision,
            local_dir=work,
            endpoint=os.environ.get("HF_ENDPOINT"),
            **settings,
        ),
        label,
    )
    if sha256 is not None and sha256_file(Path(path)) != sha256:
        Path(path).unlink()
        raise RuntimeError(
            f"{label} has not the SHA-256 that the Hub publishes ({sha256}): it is deleted, run the same "
            "command again"
        )
    publish(Path(path), target)


def _repeat(action: Any, what: str) -> Any:
    """Do it, again with backoff unless it was refused.

    Raises:
        RuntimeError: a sentence.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            # The client's errors have no common base: httpx's, its own, Xet's, and OSError.
            refusal = _refusal(error)
            if refusal is not None:
                raise RuntimeError(refusal) from None
            if attempt == ATTEMPTS:
                raise RuntimeError(
                    f"{what} failed {ATTEMPTS} times ({_in_short(error)}): check the network and run the "
                    "same command again; whole files are kept"
                ) from None
            wait = WAIT_SECONDS * 2 ** (attempt - 1)
            print(f"{what}: {_in_short(error)}; trying again in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _refusal(error: Exception) -> str | None:
    """What the user has to change, None where another attempt may help."""
    hub = _hub_module()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some space and run the same command again (whole files are kept)"
    if isinstance(error, hub.errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to download"
    status = _status(error)
    if status in (401, 403) or isinstance(error, hub.errors.RepositoryNotFoundError):
        begin = "no Hugging Face token was found" if hub.get_token() is None else "the Hub refuses this token"
        return (
            f"{begin}: accept the licence at {PAGE}, make a token with read access at "
            "https://huggingface.co/settings/tokens, and put it in HF_TOKEN (or run hf auth login)"
        )
    if isinstance(error.__cause__, hub.errors.FileMetadataError):
        return (
            f"{os.environ.get('HF_ENDPOINT', 'the Hub')} does not answer as the Hub does: check HF_ENDPOINT"
        )
    if status == 404:
        return f"the Hub does not have it ({_in_short(error)}): see {PAGE}"
    return None


def _status(error: BaseException | None) -> int | None:
    """Of the HTTP answer that the error or one that it hides is about."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _in_short(error: Exception) -> str:
    status = _status(error)
    return f"the Hub answered {status}" if status else type(error).__name__


def _hub_module() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise RuntimeError("imagenet-hf needs huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


def _bar_class(label: str) -> type:
    """What the client makes its bars of: they feed one of ours, in MB/s, in a terminal and in a log."""

    class Feed:
        def __init__(self, *_: Any, total: int | None = None, initial: int = 0, **__: Any) -> None:
            self._bar: tqdm[Any] = byte_bar(total, label, initial)
            self.n, self.total = initial, total

        def __enter__(self) -> Feed:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

        def update(self, num_bytes: float | None = 1) -> None:
            self._bar.update(num_bytes)

        def close(self) -> None:
            self._bar.close()

        # Xet tells traffic and written bytes apart, and writes rates after the bar: one bar is enough.
        def update_transfer(self, num_bytes: float) -> None: ...

        def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

        def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None: ...

    return Feed
