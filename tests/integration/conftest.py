"""Fixtures of the S3 tests, here so that their modules share one server and one set of images."""

from tests.integration.s3_server import bucket, moto_port
from tests.integration.s3_sets import noise_sets

__all__ = ["bucket", "moto_port", "noise_sets"]
