"""Commands that look into a bucket or empty it, by themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.manifest import Manifest
from infra.aws import Aws
from infra.commands.down import empty_bucket
from infra.preflight import check_data
from tests.integration.s3_server import Bucket


def test_every_version_goes(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.server.direct)
    s3, name = bucket.s3, bucket.name
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    for key, num_versions, is_deleted in (("a", 1, False), ("jobs/mine/.lock", 3, True), ("b", 2, False)):
        for number in range(num_versions):
            s3.put_object(Bucket=name, Key=key, Body=str(number).encode())
            if is_deleted:
                s3.delete_object(Bucket=name, Key=key)
    s3.create_multipart_upload(Bucket=name, Key="unfinished")
    cloud: Any = SimpleNamespace(aws=Aws("us-east-1"), bucket=name)
    empty_bucket(cloud)
    listed = s3.list_object_versions(Bucket=name)
    assert not listed.get("Versions") and not listed.get("DeleteMarkers")
    assert not s3.list_multipart_uploads(Bucket=name).get("Uploads")


def test_data_in_s3_is_whole_or_it_is_said_what_is_not(
    bucket: Bucket, prepared_tars: tuple[Path, Manifest]
) -> None:
    bucket.put_folder("data/set", prepared_tars[0])
    data = check_data(bucket.at("data/set"))
    assert data.sha256 == check_data(str(prepared_tars[0])).sha256
    shard = data.manifest.splits["train"].shards[0].name
    bucket.put(f"data/set/{shard}", bucket.get(f"data/set/{shard}")[:-1])
    with pytest.raises(ValueError, match=rf"{shard} has [\d,]+ bytes, its manifest says"):
        check_data(bucket.at("data/set"))
    bucket.s3.delete_object(Bucket=bucket.name, Key=f"data/set/{shard}")
    with pytest.raises(ValueError, match=f"{shard} is missing"):
        check_data(bucket.at("data/set"))
