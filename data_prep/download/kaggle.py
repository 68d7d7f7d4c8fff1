"""ImageNet from its Kaggle competition: the zip, kept as it comes (`prepare` reads it without unpacking).

kagglehub reads the credentials and asks Kaggle for the zip's signed address. Its `competition_download` has
no option to keep the zip: it unpacks it and only then deletes it, which needs twice the disk. Into a folder
of the user's it does not resume either. So the bytes come by `transfer.fetch`, and the address is asked for
anew at each attempt, because it expires.

The address of Kaggle itself can only be changed as kagglehub has it (`KAGGLE_API_ENVIRONMENT`).
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Mapping
from pathlib import Path

from data_prep.download.transfer import Interrupted, Link, RemoteFile, fetch

COMPETITION = "imagenet-object-localization-challenge"
ZIP_NAME = f"{COMPETITION}.zip"
PAGE = f"https://www.kaggle.com/competitions/{COMPETITION}"


def remote_files() -> list[RemoteFile]:
    """The competition's one zip.

    Raises:
        RuntimeError: kagglehub is missing, or there are no credentials.
    """
    client = _client_module()
    if not client.get_kaggle_credentials():
        raise RuntimeError(
            "no Kaggle credentials were found: make a token at https://www.kaggle.com/settings and put it in "
            f"~/.kaggle/kaggle.json or KAGGLE_API_TOKEN, and accept the rules at {PAGE}/rules"
        )

    def get(target: Path, label: str) -> None:
        fetch(_signed_link, target, label=label)

    return [RemoteFile(ZIP_NAME, None, None, get)]


def _client_module():
    try:
        from kagglehub import clients
    except ImportError:
        raise RuntimeError("imagenet-kaggle needs kagglehub: pip install kagglehub") from None
    if not hasattr(clients, "build_kaggle_client"):
        raise RuntimeError("imagenet-kaggle needs a newer kagglehub: pip install -U 'kagglehub>=1.0'")
    return clients


def _signed_link() -> Link:
    import requests
    from kagglesdk.competitions.types.competition_api_service import ApiDownloadDataFilesRequest

    request = ApiDownloadDataFilesRequest()
    request.competition_name = COMPETITION
    with _client_module().build_kaggle_client() as client:
        try:
            response = client.competitions.competition_api_client.download_data_files(request)
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            raise _refusal(status) from None
        except requests.RequestException as error:
            raise Interrupted(f"Kaggle does not answer ({type(error).__name__})") from None
        with contextlib.closing(response):
            return Link(response.url, _checksums(response.headers))


def _refusal(status: int) -> Exception:
    if status == 401:
        return RuntimeError(
            "Kaggle does not know these credentials: make a new token at https://www.kaggle.com/settings for "
            "~/.kaggle/kaggle.json or KAGGLE_API_TOKEN"
        )
    if status == 403:
        return RuntimeError(
            f"Kaggle refuses the competition's files to you: accept its rules at {PAGE}/rules with the "
            "account that the token belongs to, then run the same command again"
        )
    if status == 404:
        return RuntimeError(f"Kaggle has no files at {PAGE}: see whether the competition has moved")
    return Interrupted(f"Kaggle answered {status}")


def _checksums(headers: Mapping[str, str]) -> dict[str, str]:
    """Of `x-goog-hash: crc32c=n03x6A==,md5=Ojk9c3dhfxgoKVVHYwFbHQ==` the md5, else the other, as hex."""
    found = {}
    for entry in headers.get("x-goog-hash", "").split(","):
        name, _, value = entry.strip().partition("=")
        with contextlib.suppress(ValueError):
            found[name] = base64.b64decode(value, validate=True).hex()
    return {name: found[name] for name in ("md5", "crc32c") if found.get(name)}
