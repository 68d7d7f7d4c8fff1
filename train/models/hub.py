"""Pretrained weights of timm's and torchvision's hubs, without waiting for a network that is not there.

huggingface_hub asks six times for each of two files, 47 seconds where names are not resolved, and minutes
behind a firewall that drops packets. So the hub is tried with one short request first; where it does not
answer, only what is in the libraries' own caches counts (HF_HOME, TORCH_HOME).

Example:
    >>> with prepared_hub(config):  # or Unavailable: huggingface.co does not answer, …
    ...     model = timm.create_model(config.name, pretrained=True)
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from train.config import ModelSection

ANSWER_SECONDS = 5.0  # for one request; names are looked up within it, too
WAYS_OUT = (
    "bring this machine to the network, or set model.pretrained=if_available (random weights then), "
    "model.checkpoint=FILE (or a run folder), or model.pretrained=false"
)


class Unavailable(ValueError):
    """Pretrained weights that cannot be had; `reason` says why, without the ways out."""

    def __init__(self, config: ModelSection, reason: str) -> None:
        self.reason = reason
        name = f"{config.library}'s {config.name}"
        super().__init__(f"pretrained weights of {name} cannot be had ({reason}): {WAYS_OUT}")


@contextlib.contextmanager
def prepared_hub(config: ModelSection) -> Iterator[None]:
    """Within it, the library loads weights from its cache, or from a hub that answers.

    Raises:
        Unavailable: there are no such weights, or they are not cached and the hub does not answer.
    """
    repository, url = weights_address(config)
    if repository is None and url is None:
        raise Unavailable(config, f"{config.library} knows of none")
    if url is not None and repository is None:
        host = urlparse(url).netloc
        if not _is_cached(url) and not answers(f"https://{host}"):
            raise Unavailable(config, f"{host} does not answer, and they are not cached")
        yield
        return
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    is_offline = was_offline or not answers(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = is_offline  # its own switch, but for this process only
    try:
        yield
    except Unavailable:
        if is_offline:
            host = urlparse(constants.ENDPOINT).netloc
            why = "HF_HUB_OFFLINE is set" if was_offline else f"{host} does not answer"
            raise Unavailable(config, f"{why}, and they are not cached") from None
        raise
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def weights_address(config: ModelSection) -> tuple[str | None, str | None]:
    """Where the library keeps a model's weights: repository on the Hugging Face hub, or address of a file."""
    if config.library == "torchvision":
        import torchvision

        with contextlib.suppress(ValueError):  # for a model without weights
            return None, torchvision.models.get_model_weights(config.name)["DEFAULT"].url
        return None, None
    import timm

    found: Any = timm.get_pretrained_cfg(config.name)
    if found is None:
        return None, None
    return found.hf_hub_id or None, found.url or None


def _is_cached(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name).is_file()


def answers(address: str, seconds: float = ANSWER_SECONDS) -> bool:
    """Whether a web server answers, with whatever; through the proxy that the environment names."""
    heard: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(address, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                heard.append(True)
        except urllib.error.HTTPError:
            heard.append(True)
        except (OSError, ValueError) as error:
            # Without certificates of its own, this is no judge: the hub's client brings some.
            heard.append(isinstance(getattr(error, "reason", error), ssl.SSLError))

    # A thread, since looking up a name knows no time limit.
    thread = threading.Thread(target=ask, name="hub", daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(heard) and heard[0]
