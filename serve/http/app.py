"""The routes: `/predict`, `/healthz`, `/metrics`, `/openapi.json`."""

# No postponed annotations here: FastAPI reads those of the routes, and they name local values.
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serve.http import multipart, schemas
from serve.http.batching import Batcher
from serve.http.bodies import BodyMemory, read_body, too_large
from serve.http.faults import CLIENT_GONE, ClientGone, Refused, busy, shutting_down
from serve.http.guard import Guard
from serve.http.keys import ApiKeys
from serve.http.metrics import CONTENT_TYPE, Metrics
from serve.http.multipart import Upload
from serve.http.settings import Settings
from serve.portable.classifier import Classifier
from serve.portable.limits import BadImage
from serve.portable.predictions import top_predictions

DEFAULT_TOP = 5
RAW_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")  # curl's own for --data
DESCRIPTION = """POST an image, get its classes:

    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict?top=3
    curl --form file=@one.jpg --form file=@two.png http://127.0.0.1:8000/predict
"""


def build_app(classifier: Classifier, settings: Settings, keys: ApiKeys, model_sha256: str) -> Guard:
    """The ASGI application for one model."""
    metrics = Metrics()
    memory = BodyMemory(settings.max_buffered_bytes)
    batcher = Batcher(classifier, settings, metrics)
    info = classifier.info
    model = schemas.ModelFacts(
        title=info.title,
        sha256=model_sha256,
        checkpoint_sha256=info.provenance.get("checkpoint_sha256") or None,
    )
    num_classes = len(info.class_names)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.close()

    app = FastAPI(
        title="Image classification",
        summary=model.title,
        description=DESCRIPTION,
        version=model_sha256[:12],
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )

    @app.post(
        "/predict",
        summary="Classes of one or several images",
        response_model=schemas.Answer,
        responses=schemas.RESPONSES,
        openapi_extra={
            "requestBody": schemas.REQUEST_BODY,
            **({"security": [{"bearer": []}, {"header": []}]} if keys else {}),
        },
    )
    async def predict(
        request: Request,
        top: Annotated[
            int,
            Query(ge=1, le=num_classes, description="How many classes of each image, the likeliest first."),
        ] = min(DEFAULT_TOP, num_classes),
    ) -> Response:
        batcher.check_room()  # before its body is read
        with memory.account() as account:
            uploads, fields = await _uploads(request, settings, account)
            top = _top_of(fields, top, num_classes)
            request.state.facts["images"] = len(uploads)
            found = await _unless_gone(request, batcher.logits([u.content for u in uploads]), settings)
        if len(found) == 1 and isinstance(found[0], BadImage):
            raise Refused.of_image(found[0])
        rows = [_prediction(upload, one, info.names, top) for upload, one in zip(uploads, found, strict=True)]
        if all(row.top is None for row in rows):
            first = next(one for one in found if isinstance(one, BadImage))
            raise Refused.of_image(first)
        answer = schemas.Answer(model=model, predictions=rows)
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.get("/healthz/live", summary="Whether the process is alive", response_model=schemas.Health)
    async def live() -> schemas.Health:
        return schemas.Health(status="live")

    @app.get("/healthz", summary="Whether it takes requests", response_model=schemas.Health)
    @app.get("/healthz/ready", summary="The same", response_model=schemas.Health)
    async def ready() -> schemas.Health:
        if guard.is_stopping:
            raise shutting_down()
        return schemas.Health(status="ready")

    @app.get("/metrics", summary="For Prometheus", response_class=Response)
    async def read_metrics() -> Response:
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE})

    _add_fault_handlers(app, num_classes)
    guard = Guard(app, settings, metrics, keys)
    if keys:
        _describe_keys(app)
    metrics.gauge(
        "serve_queue_images", "Images that were accepted and are not answered.", lambda: batcher.num_waiting
    )
    metrics.gauge("serve_open_requests", "Requests that are being answered.", lambda: guard.num_open)
    metrics.gauge("serve_body_bytes", "Bytes of bodies in memory.", lambda: memory.num_bytes)
    metrics.info("serve_model_info", "The model.", {"title": model.title, "sha256": model.sha256})
    return guard


async def _uploads(request: Request, settings: Settings, account: Any) -> tuple[list[Upload], dict[str, str]]:
    """The images of a request, and the fields beside them."""
    content_type = request.headers.get("content-type", "")
    kind = content_type.split(";")[0].strip().lower()
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "unsupported", "Send the image as it is, without a Content-Encoding.")
    if kind == "multipart/form-data":
        body = await read_body(request.receive, settings.max_request_bytes, settings.body_seconds, account)
        loop = asyncio.get_running_loop()
        files, fields = await loop.run_in_executor(
            None, multipart.parse, body, content_type, settings.max_files
        )
        if not files:
            raise Refused(400, "empty", "There is no file in this request: name the field `file`.")
        return files, fields
    if kind not in RAW_TYPES and not kind.startswith("image/"):
        raise Refused(
            415,
            "unsupported",
            "Send an image's bytes (Content-Type: image/jpeg and the like), or multipart/form-data.",
        )
    if int(request.headers.get("content-length", "0")) > settings.max_bytes:
        raise too_large(settings.max_bytes)
    body = await read_body(request.receive, settings.max_bytes, settings.body_seconds, account)
    return [Upload(None, body)], {}


def bad_top(num_classes: int) -> Refused:
    return Refused(422, "bad_top", f"`top` must be a whole number from 1 to {num_classes}.")


def _top_of(fields: dict[str, str], top: int, num_classes: int) -> int:
    """The form's `top`, or else the query's."""
    if "top" not in fields:
        return top
    text = fields["top"].strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 8 and 1 <= int(text) <= num_classes):
        raise bad_top(num_classes)
    return int(text)


async def _unless_gone(request: Request, work: Any, settings: Settings) -> Any:
    """The work's result; it is given up where the client leaves, or where it takes too long."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(request.receive())  # after the body: returns when the client leaves
    try:
        await asyncio.wait(
            [working, watching], timeout=settings.answer_seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if working.done():
            return working.result()
        if watching.done():
            raise ClientGone
        raise busy(f"the answer took more than {settings.answer_seconds:g} seconds")
    finally:
        for task in (working, watching):
            task.cancel()


def _prediction(upload: Upload, found: Any, names: tuple[str, ...], top: int) -> schemas.ImagePrediction:
    if isinstance(found, BadImage):
        facts = schemas.ErrorFacts(code=found.fault, message=str(found))
        return schemas.ImagePrediction(name=upload.name, top=None, error=facts)
    prediction = top_predictions(np.asarray(found)[None], names, top)[0]
    classes = [schemas.ClassProbability(**row) for row in prediction.as_dict()["top"]]
    return schemas.ImagePrediction(name=upload.name, top=classes)


def _add_fault_handlers(app: FastAPI, num_classes: int) -> None:
    """Everything but a 200 is `{"error": {"code": …, "message": …}}`."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        request.state.facts["code"] = error.code
        headers = {name.decode(): value.decode() for name, value in error.headers()}
        return Response(error.body(), error.status, headers)

    @app.exception_handler(ClientGone)
    async def gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=CLIENT_GONE)  # for the log: the connection is closed

    @app.exception_handler(RequestValidationError)
    async def bad_parameter(request: Request, _: RequestValidationError) -> Response:
        return await refused(request, bad_top(num_classes))

    @app.exception_handler(HTTPException)
    async def of_routing(request: Request, error: HTTPException) -> Response:
        code, sentence = {
            404: ("no_such_path", "There is nothing here: POST an image to /predict."),
            405: ("no_such_method", "POST images to /predict, and GET the other paths."),
        }.get(error.status_code, ("refused", "This request cannot be answered."))
        response = await refused(request, Refused(error.status_code, code, sentence))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failure(request: Request, _: Exception) -> Response:
        return await refused(request, Refused(500, "failure", "This server has failed: its log says why."))


def _describe_keys(app: FastAPI) -> None:
    make = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make()
        schema.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
