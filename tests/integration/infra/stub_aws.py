"""A stand-in for the AWS CLI, for sandboxes: every call is written down, and done against AWS_ENDPOINT_URL.

It knows what the scripts of infra/bootstrap use: `s3 cp`, `s3 sync`, `s3api put-object --if-none-match`,
`s3api list-objects-v2` with a query that counts what was modified since, `autoscaling set-desired-capacity`
and `suspend-processes`, `sns publish`, `ecr get-login-password`. Written with the standard library only,
since it starts a dozen times a test.

    STUB_CALLS      file that a line of JSON a call is appended to
    STUB_FAULTS     file with JSON: {"autoscaling set-desired-capacity": 2}: so many calls fail, -1: all
    STUB_PERFORM    services that are really asked (default: s3 s3api); the others only succeed
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

ENDPOINT = os.environ.get("AWS_ENDPOINT_URL", "")


def main(words: list[str]) -> int:
    service, operation = [*words, "", ""][:2]
    options = {words[i][2:]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("--")}
    places = [word for word in words[2:] if not word.startswith("--")]
    code = 1 if _fails(f"{service} {operation}") else 0
    with open(os.environ["STUB_CALLS"], "a") as file:  # noqa: PTH123 (a light import matters here)
        call = {"command": "aws", "words": words, "code": code, "time": time.time()}
        file.write(json.dumps(call) + "\n")
    if code:
        sys.stderr.write("An error occurred (Stub) when calling: a fault of the test\n")
        return code
    if service not in os.environ.get("STUB_PERFORM", "s3 s3api").split():
        return 0
    try:
        if (service, operation) == ("s3", "cp"):
            _copy(*places[-2:])
        elif (service, operation) == ("s3", "sync"):
            _sync(*places[-2:])
        elif (service, operation) == ("s3api", "put-object"):
            condition = {"If-None-Match": options["if-none-match"]} if "if-none-match" in options else {}
            with open(options["body"], "rb") as file:  # noqa: PTH123
                _ask("PUT", f"/{options['bucket']}/{options['key']}", file.read(), condition)
        elif (service, operation) == ("s3api", "list-objects-v2"):
            sys.stdout.write(f"{_count(options)}\n")
        elif service == "autoscaling":
            _autoscaling(operation, options)
    except urllib.error.HTTPError as error:
        sys.stderr.write(f"An error occurred ({error.code})\n")
        return 254
    return 0


def _fails(name: str) -> bool:
    path = os.environ.get("STUB_FAULTS", "")
    if not path or not os.path.exists(path):  # noqa: PTH110
        return False
    with open(path) as file:  # noqa: PTH123
        faults = json.load(file)
    left = faults.get(name, 0)
    if left > 0:
        with open(path, "w") as file:  # noqa: PTH123
            json.dump(faults | {name: left - 1}, file)
    return bool(left)


def _copy(source: str, target: str) -> None:
    if source.startswith("s3://"):
        content = _ask("GET", "/" + source.removeprefix("s3://"))
        with open(target, "wb") as file:  # noqa: PTH123
            file.write(content)
    else:
        with open(source, "rb") as file:  # noqa: PTH123
            _ask("PUT", "/" + target.removeprefix("s3://"), file.read())


def _sync(source: str, target: str) -> None:
    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    listed = _ask("GET", f"/{bucket}?list-type=2&prefix={urllib.parse.quote(prefix)}").decode()
    os.makedirs(target, exist_ok=True)  # noqa: PTH103
    for piece in listed.split("<Key>")[1:]:
        key = piece.split("</Key>")[0]
        _copy(f"s3://{bucket}/{key}", os.path.join(target, key.rpartition("/")[2]))  # noqa: PTH118


def _count(options: dict[str, str]) -> int:
    """Objects below the prefix that are no older than the query's time."""
    asked = re.fullmatch(r"length\(Contents\[\?LastModified>='(.*)'\] \|\| `\[\]`\)", options["query"])
    assert asked is not None, options["query"]
    prefix = urllib.parse.quote(options["prefix"])
    listed = _ask("GET", f"/{options['bucket']}?list-type=2&prefix={prefix}").decode()
    return sum(time >= asked[1] for time in re.findall(r"<LastModified>(.*?)</LastModified>", listed))


def _autoscaling(operation: str, options: dict[str, str]) -> None:
    name = "".join(part.capitalize() for part in operation.split("-"))
    fields = {
        "Action": name,
        "Version": "2011-01-01",
        "AutoScalingGroupName": options["auto-scaling-group-name"],
    }
    if "desired-capacity" in options:
        fields["DesiredCapacity"] = options["desired-capacity"]
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    _ask("POST", "/", urllib.parse.urlencode(fields).encode(), headers, "autoscaling")


def _ask(
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    service: str = "s3",
) -> bytes:
    # Enough of a signature for moto to see which service is meant, and that somebody asks.
    region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    scope = f"Credential=dummy/20200101/{region}/{service}/aws4_request"
    signed = {"Authorization": f"AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=none"}
    request = urllib.request.Request(
        ENDPOINT + path,
        data=body,
        headers={"Content-Type": "binary/octet-stream"} | (headers or {}) | signed,
        method=method,
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return bytes(answer.read())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
