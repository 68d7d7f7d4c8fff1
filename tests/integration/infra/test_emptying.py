"""A bucket with versions is emptied whole, before it is removed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from infra.aws import Aws
from infra.commands.down import empty_bucket
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
