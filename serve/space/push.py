"""A Space's folder to the Hugging Face Hub, on request only."""

from __future__ import annotations

import re
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_name(name: str) -> str:
    """The name of a Space, as it was given. ValueError: it is not USER/NAME."""
    if not NAME.fullmatch(name):
        raise ValueError(f"a Space is called USER/NAME, not {name[:80]!r}")
    return name


def push_space(folder: Path, name: str, private: bool) -> str:
    """Make the Space where there is none, and put the folder's files into it; its address.

    The token comes from where huggingface_hub looks for it: HF_TOKEN, or `hf auth login`. One that exists
    keeps its visibility.

    Raises:
        ValueError: no huggingface_hub, no token, or the Hub refuses.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    except ImportError:
        raise ValueError("huggingface_hub is not installed: pip install huggingface_hub") from None
    api = HfApi(library_name="imagenet-sprint")
    try:
        api.create_repo(name, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            repo_type="space",
            folder_path=folder,
            commit_message="Update the Space",
            delete_patterns=["app.py", "model/*", "serve/**", "examples/*"],
            ignore_patterns=["**/__pycache__/**", ".git/**", ".cache/**"],
        )
    except LocalTokenNotFoundError:
        raise ValueError("there is no token of the Hub: hf auth login, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        advice = {401: "hf auth login, or set HF_TOKEN", 403: "the token may not write there"}
        raise ValueError(
            f"the Hub refuses {name} ({status}): {advice.get(status, 'try again later')}"
        ) from None
    except Exception as error:  # no network, in the words of whatever library it uses
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise ValueError(f"the Hub did not take it ({reason}): the same command goes on") from None
    return f"https://huggingface.co/spaces/{name}"
