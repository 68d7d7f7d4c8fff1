"""The forms of a model, each a file: safetensors, ONNX, TorchScript, pt2. In fp32; int8 is in `int8.py`.

All but the weights alone take uint8 images (n, side, side, 3) and give logits (n, classes), for any n of at
least 1.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from serve.export.timm_folder import timm_fault, write_timm_config
from serve.model_folder import TIMM_CONFIG_NAME, Source, model_section
from serve.served_model import ServedModel

Outputs = tuple[str, ...]
MAX_BATCH = 1024  # that torch.export proves shapes for; onnxruntime takes any


def write_form(form: str, source: Source, path: Path) -> None:
    """Write one of `safetensors`, `onnx`, `torchscript`, `pt2` to `path`.

    Raises:
        ValueError: the package that it takes is missing, or the network cannot be traced.
    """
    if form == "safetensors":
        _write_safetensors(source, path)
        return
    write_traced(form, served_model(source), source.info.preprocessing.resolution, path)


def write_traced(form: str, served: nn.Module, side: int, path: Path, outputs: Outputs = ("logits",)) -> None:
    """Write a module that takes uint8 images (n, side, side, 3).

    Args:
        outputs: names of its outputs, in ONNX.

    Raises:
        ValueError: as `write_form`.
    """
    # Two, as a batch of one would be taken for a constant.
    images = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad(), quiet():
        warnings.simplefilter("ignore")
        try:
            if form == "onnx":
                _write_onnx(served, images, path, outputs)
            elif form == "pt2":
                torch.export.save(_exported(served, images), path)
            else:
                torch.jit.trace(served, images, check_trace=False).save(str(path))
        except ImportError as error:
            raise ValueError(f"{error.name} is not installed: pip install 'imagenet-sprint[serve]'") from None
        except ValueError:
            raise
        except Exception as error:  # tracers raise all kinds
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            raise ValueError(
                f"the network cannot be written as {form} ({reason}): take another format"
            ) from None


def served_model(source: Source) -> ServedModel:
    """A copy on the CPU, as it is traced: in the usual memory format, which tracers want."""
    model = copy.deepcopy(source.model).cpu().to(memory_format=torch.contiguous_format).eval()
    normalize = copy.deepcopy(source.normalize).cpu()
    normalize.channels_last = False
    return ServedModel(model, normalize, source.info.flip_average).eval()


def _write_safetensors(source: Source, path: Path) -> None:
    from safetensors.torch import save_file

    # Cloned: weights that two layers share are refused otherwise.
    weights = {name: value.cpu().contiguous().clone() for name, value in source.model.state_dict().items()}
    digest = str(source.info.provenance.get("checkpoint_sha256") or "")
    save_file(weights, path, {"format": "pt", "checkpoint_sha256": digest})
    path.chmod(0o644)
    section = model_section(source.info, path.parent)
    if timm_fault(section) is None:
        write_timm_config(path.parent, section, source.info)
    else:
        (path.parent / TIMM_CONFIG_NAME).unlink(missing_ok=True)  # of an export before this one


def _write_onnx(served: nn.Module, images: torch.Tensor, path: Path, outputs: Outputs) -> None:
    import onnx  # noqa: F401  # a missing one is said before the work
    import onnxscript  # noqa: F401

    torch.onnx.export(
        _exported(served, images),
        f=path,
        input_names=["images"],
        output_names=list(outputs),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _exported(served: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    return torch.export.export(served, (images,), dynamic_shapes={"images": {0: batch}}, strict=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' reports of each step."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
