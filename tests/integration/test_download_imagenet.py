"""ImageNet with the real clients (kagglehub, huggingface_hub, boto3) against servers on this machine."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.download import kaggle, transfer, upload
from tests.integration.download_server import KAGGLE_CALL, SIGNATURE, DownloadServer
from tests.integration.test_download import driver, hidden_files, run

TOKEN = "a-token-of-the-user"
CONTENT = random.Random(1).randbytes(700_000)
SHARDS = {
    name: random.Random(name).randbytes(size)
    for name, size in {
        "data/train-00000-of-00002.parquet": 400_000,
        "data/train-00001-of-00002.parquet": 350_000,
        "data/validation-00000-of-00001.parquet": 80_000,
        "data/test-00000-of-00001.parquet": 1_000,
    }.items()
}
WANTED = {name: content for name, content in SHARDS.items() if "/test-" not in name}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's own tokens and settings must not reach the tests."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transfer, "MAX_WAIT_SECONDS", 0.02)


@pytest.fixture
def server() -> Iterator[DownloadServer]:
    server = DownloadServer()
    yield server
    server.close()


@pytest.fixture
def competition(server: DownloadServer, monkeypatch: pytest.MonkeyPatch) -> DownloadServer:
    config = pytest.importorskip("kagglehub.config")
    from kagglesdk import kaggle_env

    # kagglehub has no setting for another address than Kaggle's own.
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, server.url)
    monkeypatch.setattr(config, "DEFAULT_KAGGLE_CREDENTIALS_FOLDER", "/nonexistent")
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    server.serve_kaggle(CONTENT, TOKEN)
    return server


@pytest.fixture
def hub(server: DownloadServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DownloadServer:
    constants = pytest.importorskip("huggingface_hub.constants")
    from data_prep.download import hub

    monkeypatch.setattr(hub, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # it resumes at whole ones of 10 MiB
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.serve_hub(SHARDS, TOKEN)
    return server


def assert_same(folder: Path, files: dict[str, bytes]) -> None:
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert found == files


# --- Kaggle ---


@pytest.mark.parametrize("hashes", [("md5",), ("crc32c",), ("crc32c", "md5"), ()])
def test_kaggle_keeps_the_zip_and_continues(
    competition: DownloadServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], hashes: tuple[str, ...]
) -> None:
    competition.serve_kaggle(CONTENT, TOKEN, hashes)
    competition.faults = ["", "drop:200000"]  # the client's own redirected request comes first
    assert run("imagenet-kaggle", "--out", tmp_path) == 0
    assert_same(tmp_path, {kaggle.ZIP_NAME: CONTENT})
    assert competition.gets("/storage/c.zip")[-1] == "bytes=200000-"
    calls = [asked for asked in competition.asked if asked.path == KAGGLE_CALL]
    assert len(calls) == 2, "a signed address is asked for anew: it expires"
    out, errors = capfd.readouterr()
    assert f"next: python -m data_prep prepare --source {tmp_path / kaggle.ZIP_NAME}" in out
    assert (hashes[-1] if hashes else "no checksum is published") in out
    assert TOKEN not in out + errors and SIGNATURE not in out + errors
    assert not [asked for asked in competition.asked if "storage" in asked.path and asked.authorization]
    asked = len(competition.asked)
    assert run("imagenet-kaggle", "--out", tmp_path) == 0 and len(competition.asked) == asked


def test_kaggle_compares_its_checksum(competition: DownloadServer, tmp_path: Path) -> None:
    competition.faults = ["", "flip"]
    with pytest.raises(RuntimeError, match=r"has md5 .* not the expected .* deleted"):
        run("imagenet-kaggle", "--out", tmp_path)
    assert_same(tmp_path, {})


def test_kaggle_refusals_say_what_to_do(
    competition: DownloadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["imagenet-kaggle", "--out", str(tmp_path)]
    competition.refuse_kaggle(403)
    with pytest.raises(RuntimeError, match=r"accept its rules at https://www\.kaggle\.com/.*/rules"):
        run(*arguments)
    competition.refuse_kaggle(401)
    with pytest.raises(RuntimeError, match=r"new token at .*kaggle\.json or KAGGLE_API_TOKEN"):
        run(*arguments)
    monkeypatch.setattr(transfer, "MAX_FRUITLESS", 2)
    competition.refuse_kaggle(503)
    with pytest.raises(RuntimeError, match="Kaggle answered 503"):
        run(*arguments)
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with pytest.raises(RuntimeError, match="no Kaggle credentials were found"):
        run(*arguments)
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(RuntimeError, match="pip install kagglehub"):
        run(*arguments)


# --- Hugging Face ---


def test_the_hub_s_shards_arrive(
    hub: DownloadServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    hub.faults = ["drop:100000", "", "503"]  # the client resumes the first, and gives up on the third
    assert run("imagenet-hf", "--out", out) == 0
    assert_same(out, WANTED)
    assert hub.gets("/storage/data/train-00000-of-00002.parquet") == [None, "bytes=100000-"]
    assert hidden_files(out) == []
    printed, errors = capfd.readouterr()
    assert f"next: python -m data_prep prepare --source {out} --out {out}-prepared" in printed
    assert TOKEN not in printed + errors
    hub.sent_bytes = 0
    assert run("imagenet-hf", "--out", out) == 0 and hub.sent_bytes == 0
    (out / "data/train-00001-of-00002.parquet").write_bytes(b"short")
    assert run("imagenet-hf", "--out", out, "--with-test") == 0
    assert_same(out, SHARDS)
    assert hub.sent_bytes == 351_000


def test_a_killed_hub_download_keeps_whole_files(hub: DownloadServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hub.bytes_per_second = 800_000
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    process = driver(["imagenet-hf", "--out", str(out)], environment)
    while hub.sent_bytes < 500_000:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list((out / ".download").rglob("*.incomplete"))) == 1, "the client's part of a file"
    hub.bytes_per_second = None
    assert run("imagenet-hf", "--out", out) == 0
    assert_same(out, WANTED)
    assert len(hub.gets("/storage/data/train-00000-of-00002.parquet")) == 1
    assert hub.gets("/storage/data/train-00001-of-00002.parquet") == [None, None], "from its beginning"


def test_the_hub_s_checksum_is_compared(hub: DownloadServer, tmp_path: Path) -> None:
    hub.faults = ["", "flip"]
    with pytest.raises(RuntimeError, match=r"train-00001.* has not the SHA-256 .* it is deleted"):
        run("imagenet-hf", "--out", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("train-00001-of-00002.parquet"))
    assert run("imagenet-hf", "--out", tmp_path / "out") == 0
    assert_same(tmp_path / "out", WANTED)


def test_the_hub_s_refusals_say_what_to_do(
    hub: DownloadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["imagenet-hf", "--out", str(tmp_path / "out")]
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(RuntimeError, match=r"refuses this token: accept the licence at .*HF_TOKEN"):
        run(*arguments)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RuntimeError, match="no Hugging Face token was found"):
        run(*arguments)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match=r"failed 5 times .* check the network"):
        run(*arguments)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match="pip install huggingface_hub"):
        run(*arguments)


# --- S3 ---


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    from data_prep import s3, s3_requests

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "dummy",
        "AWS_SECRET_ACCESS_KEY": "dummy",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3_requests._client.cache_clear()
    name = f"bucket-{abs(hash(request.node.name)) % 10**8}"
    s3.client().create_bucket(Bucket=name)
    yield s3.S3Folder(f"s3://{name}/set")
    s3_requests._client.cache_clear()


def in_bucket(folder: Any) -> dict[str, bytes]:
    return {file.name: folder.read(file.name) for file in folder.files() if not file.name.startswith(".")}


def test_shards_go_on_to_s3_one_by_one(
    hub: DownloadServer, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["imagenet-hf", "--out", bucket.location, "--scratch", str(tmp_path / "scratch")]
    here, upload_file = [], upload.upload_file

    def watched(*inner: Any) -> str:
        here.append(len(list((tmp_path / "scratch").rglob("*.parquet"))))
        return upload_file(*inner)

    monkeypatch.setattr(upload, "upload_file", watched)
    assert run(*arguments) == 0
    assert here == [1, 1, 1], "the disk holds one at a time"
    assert in_bucket(bucket) == WANTED
    assert list((tmp_path / "scratch").iterdir()) == [], "nothing stays here"
    hub.sent_bytes = 0
    assert run(*arguments) == 0 and hub.sent_bytes == 0
    # Another size and other bytes of the same size are both fetched again, the rest is not.
    bucket.write("data/train-00000-of-00002.parquet", b"short")
    bucket.write("data/validation-00000-of-00001.parquet", bytes(80_000))
    assert run(*arguments) == 0 and hub.sent_bytes == 480_000
    assert in_bucket(bucket) == WANTED


def test_an_interrupted_upload_keeps_the_download(
    competition: DownloadServer, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep import s3

    content = random.Random(2).randbytes(13 << 20)
    competition.serve_kaggle(content, TOKEN)
    monkeypatch.setattr(upload, "PIECE_BYTES", 5 << 20)  # the least that S3 takes
    arguments = ["imagenet-kaggle", "--out", bucket.location, "--scratch", str(tmp_path / "scratch")]
    put = s3._MultipartUpload.put
    bucket.create(kaggle.ZIP_NAME, 5 << 20).put(0, bytes(5 << 20))  # by a run that was killed

    def interrupted(self: Any, number: int, piece: bytes) -> None:
        if number == 2:
            raise KeyboardInterrupt
        put(self, number, piece)

    with monkeypatch.context() as patch:
        patch.setattr(s3._MultipartUpload, "put", interrupted)
        assert run(*arguments) == 130
    assert in_bucket(bucket) == {}
    assert not s3.client().list_multipart_uploads(Bucket=bucket.bucket).get("Uploads"), "they cost storage"
    competition.sent_bytes = 0
    assert run(*arguments) == 0 and competition.sent_bytes == 0
    assert in_bucket(bucket) == {kaggle.ZIP_NAME: content}
    assert list((tmp_path / "scratch").iterdir()) == []
    assert run(*arguments) == 0 and competition.sent_bytes == 0


def test_what_s3_gives_back_is_compared(
    competition: DownloadServer, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep import s3

    arguments = ["imagenet-kaggle", "--out", bucket.location, "--scratch", str(tmp_path / "scratch")]
    put = s3._MultipartUpload.put
    with monkeypatch.context() as patch:
        patch.setattr(
            s3._MultipartUpload, "put", lambda self, number, piece: put(self, number, bytes(len(piece)))
        )
        with pytest.raises(RuntimeError, match=r"reads back differently .* deleted there"):
            run(*arguments)
    assert in_bucket(bucket) == {}
    assert run(*arguments) == 0
    assert in_bucket(bucket) == {kaggle.ZIP_NAME: CONTENT}


def test_an_archive_goes_to_s3_unpacked(server: DownloadServer, bucket: Any, tmp_path: Path) -> None:
    import hashlib
    import io
    import tarfile

    from tests.integration.download_server import Served

    files = {
        f"imagenette2-320/train/n01440764/{i}.JPEG": random.Random(i).randbytes(2_000) for i in range(20)
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    server.files["/a.tgz"] = Served(packed.getvalue())
    md5 = hashlib.md5(packed.getvalue()).hexdigest()
    arguments = ["imagenette", "--url", f"{server.url}/a.tgz", "--md5", md5]
    arguments += ["--out", bucket.location, "--scratch", str(tmp_path / "scratch")]
    assert run(*arguments) == 0
    assert in_bucket(bucket) == files
    assert list((tmp_path / "scratch").iterdir()) == []
    assert run(*arguments) == 0 and len(server.asked) == 1
    # A file that is gone is noticed, and only then is the archive fetched again.
    bucket.delete("imagenette2-320/train/n01440764/7.JPEG")
    assert run(*arguments) == 0 and len(server.asked) == 2
    assert in_bucket(bucket) == files
