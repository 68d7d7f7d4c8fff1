"""MLflow's model registry: an exported folder as a version of a model that takes bytes of image files.

Example:
    >>> model = mlflow.pyfunc.load_model("models:/scenes@best")
    >>> model.predict(pandas.DataFrame({"image": [Path("photo.jpg").read_bytes()]}))["name"]
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.storage import sha256_file
from serve import portable
from serve.portable.model_info import ModelInfo, load_info
from train.config.credentials import without_credentials
from train.tracking.mlflow_client import first_line, open_client, open_experiment

DIGEST_TAG = "checkpoint_sha256"
MODEL_TAG = "model_sha256"  # of all that decides an answer
PACKAGES = ("numpy", "pillow", "onnxruntime", "pandas")
MODEL_FILE = Path(__file__).with_name("pyfunc_model.py")


def register(
    folder: Path,
    name: str,
    alias: str | None,
    uri: str,
    experiment: str,
    runs_folder: Path,
    run_id: str | None,
) -> int:
    """Make a version of the registered model `name` of an exported folder with ONNX; its number.

    A model that has a version already gets no second one: the same checkpoint with the same preprocessing and
    class names. The alias moves only where it is named.

    Args:
        run_id: the MLflow run it belongs to; None, or one that the server does not know: a run of its own.

    Raises:
        RuntimeError: MLflow refuses, or cannot be reached.
    """
    open_client(uri)  # says where MLflow is missing, and sets what it reads from variables
    from mlflow import MlflowClient

    # Both: of a client that knows one, the registry would be a file where one happens to stand.
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        info = load_info(folder)
        digest = model_digest(folder, info)
        version = _known_version(client, name, digest)
        if version is None:
            version = _log(client, folder, name, uri, experiment, runs_folder, run_id)
            client.set_model_version_tag(name, str(version), MODEL_TAG, digest)
            client.set_model_version_tag(name, str(version), DIGEST_TAG, str(info.provenance.get(DIGEST_TAG)))
        if alias is not None:
            client.set_registered_model_alias(name, alias, str(version))
    except Exception as error:  # MLflow raises all kinds
        shown = without_credentials(uri)
        raise RuntimeError(f"MLflow at {shown} did not register it ({first_line(error, uri)})") from None
    return version


def model_digest(folder: Path, info: ModelInfo) -> str:
    """Of weights, preprocessing and names. The files' bytes differ from export to export, so where the
    checkpoint is known, it stands for them."""
    weights = info.provenance.get(DIGEST_TAG) or sha256_file(info.file(folder, "onnx"))
    steps = asdict(info.preprocessing)
    parts = [weights, steps, info.class_names, info.display_names, info.flip_average]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _known_version(client: Any, name: str, digest: str) -> int | None:
    quoted = name.replace("'", "")
    versions = client.search_model_versions(f"name = '{quoted}'")
    known = [int(version.version) for version in versions if version.tags.get(MODEL_TAG) == digest]
    return max(known, default=None)


def _log(
    client: Any, folder: Path, name: str, uri: str, experiment: str, runs_folder: Path, run_id: str | None
) -> int:
    import mlflow

    own = run_id if run_id and _knows(client, run_id) else None
    place = None if own else open_experiment(client, experiment, uri, runs_folder)
    before = client.get_run(own).info if own else None
    scratch = tempfile.TemporaryDirectory()
    pinned = [f"{package}=={importlib.metadata.version(package)}" for package in PACKAGES]
    with (
        scratch,
        _talking_to(uri),
        warnings.catch_warnings(),
        mlflow.start_run(run_id=own, experiment_id=place, run_name=None if own else f"register {name}"),
    ):
        warnings.simplefilter("ignore")  # of a missing example of the input: the signature tells it all
        model_file, package = _own_code(Path(scratch.name))
        logged = mlflow.pyfunc.log_model(
            name="classifier",
            python_model=str(model_file),
            artifacts={"model": str(folder)},
            code_paths=[str(package)],
            signature=_signature(),
            pip_requirements=[*pinned, f"mlflow=={mlflow.__version__}"],
            registered_model_name=name,
        )
    if before is not None:  # what MLflow's call has put over the training's own end
        if before.end_time is None:
            client.update_run(own, status=before.status)
        else:
            client.set_terminated(own, status=before.status, end_time=before.end_time)
    return int(logged.registered_model_version)


def _own_code(scratch: Path) -> tuple[Path, Path]:
    """The model's file and the package it imports, which is called after its content.

    Two versions in one process would otherwise run the code of the one that was loaded first.
    """
    source = Path(portable.__file__).parent
    content = b"".join(path.name.encode() + path.read_bytes() for path in sorted(source.glob("*.py")))
    name = f"portable_{hashlib.sha256(content).hexdigest()[:12]}"
    package = scratch / name
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    text = MODEL_FILE.read_text(encoding="utf-8")
    assert text.count("from portable.") == 1
    model_file = scratch / MODEL_FILE.name
    model_file.write_text(text.replace("from portable.", f"from {name}."), encoding="utf-8")
    return model_file, package


@contextlib.contextmanager
def _talking_to(uri: str) -> Iterator[None]:
    """MLflow's fluent calls go to `uri`; afterwards nothing of it is left, in variables neither."""
    import mlflow

    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    before = {name: os.environ.get(name) for name in names}
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before[names[0]])  # type: ignore[arg-type]  # None is nothing
        mlflow.set_registry_uri("")
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _knows(client: Any, run_id: str) -> bool:
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except Exception:  # of another server
        return False


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "name"),
                ColSpec(DataType.double, "probability"),
                ColSpec(Array(DataType.string), "names"),
                ColSpec(Array(DataType.double), "probabilities"),
                ColSpec(DataType.string, "error"),
            ]
        ),
    )
