"""AWS as these commands ask it: one client a service, and every fault as a sentence that says what to change.

Credentials, region and endpoint are found as every AWS tool finds them (`AWS_PROFILE`, `aws configure`,
`AWS_ENDPOINT_URL` …). boto3 is imported here only.

Example:
    >>> aws = Aws("us-east-1")
    >>> aws.call("sts", "get_caller_identity")["Account"]
    '123456789012'
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from infra.errors import UserError

DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthorizationError", "403")
BAD_KEYS = (
    "InvalidClientTokenId",
    "SignatureDoesNotMatch",
    "InvalidAccessKeyId",
    "AuthFailure",
    "UnrecognizedClientException",
)
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
MISSING = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")


class AwsError(UserError):
    """A request that AWS refused, as a sentence.

    Attributes:
        code: AWS's own name of the fault, or "" where it was never reached.
    """

    def __init__(self, sentence: str, code: str = "") -> None:
        super().__init__(sentence)
        self.code = code

    @property
    def is_missing(self) -> bool:
        return self.code in MISSING

    @property
    def is_denied(self) -> bool:
        return self.code in DENIED


class Aws:
    """Clients of one region.

    Args:
        region: None for the user's own.

    Raises:
        UserError: boto3 is missing, or no region is known.
    """

    def __init__(self, region: str | None = None) -> None:
        try:
            import boto3
            import botocore.exceptions
        except ImportError:
            raise UserError("the cloud needs boto3: pip install boto3") from None
        try:
            self._session = boto3.session.Session(region_name=region)
        except botocore.exceptions.BotoCoreError as error:  # a profile that is not there
            raise UserError(f"{str(error).rstrip('.')}: check AWS_PROFILE, or run aws configure") from None
        if self._session.region_name is None:
            raise UserError(
                "no AWS region is set: pass --region us-east-1, or set AWS_DEFAULT_REGION, or aws configure"
            )
        self.region: str = self._session.region_name
        self._clients: dict[str, Any] = {}

    def client(self, service: str) -> Any:
        """The botocore client itself, for pagination and streams; its faults go through `sentence`."""
        if service not in self._clients:
            from botocore.config import Config

            attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", "4"))
            config = Config(
                retries={"mode": "standard", "total_max_attempts": attempts},
                connect_timeout=10,
                read_timeout=30,
            )
            self._clients[service] = self._session.client(service, config=config)
        return self._clients[service]

    def call(self, service: str, operation: str, **arguments: Any) -> dict[str, Any]:
        """One request. Raises AwsError."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            answer: dict[str, Any] = getattr(self.client(service), operation)(**arguments)
            return answer
        except (ClientError, BotoCoreError, ResponseParserError) as error:
            raise explained(error, f"{service}:{operation}") from None

    def pages(self, service: str, operation: str, field: str, **arguments: Any) -> Iterator[Any]:
        """The members of `field` over all pages of an answer. Raises AwsError."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            for page in self.client(service).get_paginator(operation).paginate(**arguments):
                yield from page.get(field) or ()
        except (ClientError, BotoCoreError) as error:
            raise explained(error, f"{service}:{operation}") from None

    def use_for_commands(self) -> None:
        """Have what is started from here, and data_prep's S3, use the same region."""
        os.environ["AWS_DEFAULT_REGION"] = os.environ["AWS_REGION"] = self.region


def explained(error: Exception, what: str) -> AwsError:
    """The sentence of a fault of botocore."""
    from botocore.exceptions import (
        ClientError,
        EndpointConnectionError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return AwsError(
            "no AWS credentials were found: run aws configure (or aws sso login), or set AWS_PROFILE"
        )
    if isinstance(error, EndpointConnectionError | HTTPClientError):
        return AwsError(f"AWS cannot be reached ({_first_line(error)}): check the network, and try again")
    if not isinstance(error, ClientError):
        return AwsError(f"{what} failed ({_first_line(error)}): check aws configure, or log in anew")
    code, message = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
    message = message.splitlines()[0][:300] if message else ""
    if code in EXPIRED:
        return AwsError("the AWS credentials have expired: log in again (aws sso login, or new keys)", code)
    if code in BAD_KEYS:
        return AwsError(
            f"AWS does not know these credentials ({code}): check aws configure or AWS_PROFILE", code
        )
    if code in DENIED:
        return AwsError(
            f"these credentials may not do {what} ({message or code}): have infra/terraform/user_policy.json "
            "attached to the user, or use another profile",
            code,
        )
    return AwsError(f"{what} failed: {code}: {message}", code)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
