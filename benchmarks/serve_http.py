"""Images a second and latencies of `python -m serve http`: with and without batches, among hostile clients.

    python benchmarks/serve_http.py exported/mine --images ../shared/data/intel/val

Server and clients are processes of their own. N connections, kept alive, each send an image, wait for its
classes, and send the next. The variants take turns within a round, so that other work on the machine meets
all of them; medians over rounds are shown, and ratios within a round. `hostile` adds, for as long as it
lasts, clients that send wrong types, 100-megapixel images, cut images, broken HTTP, path names and slow
bodies; only the usual clients are timed.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

VARIANTS = {
    "batches of up to 32": (["--max-batch", "32"], 0),
    "one at a time": (["--max-batch", "1"], 0),
    "batches of up to 32, 8 hostile": (["--max-batch", "32"], 8),
}
ROOT = Path(__file__).parent.parent
START_SECONDS = 120.0


def request_of(content: bytes, headers: str = "Content-Type: image/jpeg") -> bytes:
    head = f"POST /predict HTTP/1.1\r\nHost: bench\r\n{headers}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def usual(port: int, contents: list[bytes], first: int, until: float, seconds: list[float]) -> int:
    """One connection that asks until `until`; returns the number of answers other than 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    number, others = first, 0
    try:
        while time.monotonic() < until:
            began = time.perf_counter()
            writer.write(request_of(contents[number % len(contents)]))
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(row for row in head.lower().split(b"\r\n") if row.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            if head.startswith(b"HTTP/1.1 200 "):
                seconds.append(time.perf_counter() - began)
            else:
                others += 1
            number += 1
    finally:
        writer.close()
    return others


def hostile_requests() -> list[bytes]:
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (10000, 10000)).save(file, "PNG")
    form = "Content-Type: multipart/form-data; boundary=b"
    part = b'--b\r\nContent-Disposition: form-data; name=file; filename="../../etc/passwd"\r\n\r\n'
    return [
        request_of(file.getvalue()),
        request_of(b"<html>" * 100),
        request_of(b"\xff\xd8\xff" + bytes(3000)),
        request_of(part + b"root\r\n--b--\r\n", form),
        request_of(b"{}", "Content-Type: application/json"),
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 10000 + b"\r\n",
    ]


async def hostile(port: int, until: float, first: int, requests: list[bytes], slow: bool) -> int:
    """Rubbish on new connections, or a body that comes byte by byte; returns the number of requests."""
    sent = 0
    while time.monotonic() < until:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if slow:
                writer.write(request_of(bytes(100_000))[:200])
                while time.monotonic() < until:
                    writer.write(b"a")
                    await asyncio.sleep(0.1)
            else:
                writer.write(requests[(first + sent) % len(requests)])
                async with asyncio.timeout(max(0.1, until - time.monotonic())):
                    await reader.read(4096)
            writer.close()
        except (OSError, TimeoutError):
            pass
        sent += 1
        await asyncio.sleep(0.02)
    return sent


async def drive(
    port: int, folder: Path, connections: int, duration: float, num_hostile: int
) -> dict[str, Any]:
    """The client process's work."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:200]
    contents = [path.read_bytes() for path in paths]
    warm = time.monotonic() + 1.0
    await asyncio.gather(*[usual(port, contents, n, warm, []) for n in range(connections)])
    seconds: list[float] = []
    rubbish = hostile_requests() if num_hostile else []
    began = time.monotonic()
    until = began + duration
    own = [usual(port, contents, 7 * n, until, seconds) for n in range(connections)]
    others = [hostile(port, until, n, rubbish, n % 4 == 0) for n in range(num_hostile)]
    results = await asyncio.gather(*own, *others)
    took = time.monotonic() - began
    seconds.sort()
    return {
        "per_second": len(seconds) / took,
        "p50": seconds[len(seconds) // 2],
        "p99": seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
        "not_200": sum(results[:connections]),
        "hostile_requests": sum(results[connections:]),
    }


def measure(options: argparse.Namespace, words: list[str], num_hostile: int) -> dict[str, Any]:
    """One server, one client process, one measurement."""
    command = [sys.executable, "-m", "serve", "http", str(options.folder.resolve()), "--port", "0", *words]
    command += options.options.split()
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        facts = json.loads(server.stdout.readline())
        port = int(facts["address"].rsplit(":", 1)[1])
        # Its lines must be read, or the pipe is full and it waits.
        reader = subprocess.Popen(["cat"], stdin=server.stdout, stdout=subprocess.DEVNULL)
        client = [sys.executable, __file__, str(options.folder), "--images", str(options.images)]
        client += ["--drive", str(port), "--connections", str(options.connections)]
        client += ["--seconds", str(options.seconds), "--hostile", str(num_hostile)]
        finished = subprocess.run(client, capture_output=True, text=True, check=True, timeout=600)
        result = json.loads(finished.stdout)
        result["resident_mb"] = resident_mb(server.pid)
        server.terminate()
        result["exit_code"] = server.wait(timeout=60)
        reader.wait(timeout=10)
        return result
    finally:
        server.kill()
        server.wait()


def resident_mb(pid: int) -> float:
    """The most that the process has had."""
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(row for row in rows if row.startswith("VmHWM")).split()[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--options", default="", help="further ones of the server: --options='--threads 1'")
    parser.add_argument("--drive", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--hostile", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        arguments = (options.drive, options.images, options.connections, options.seconds, options.hostile)
        print(json.dumps(asyncio.run(drive(*arguments))))
        return 0
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for number in range(options.rounds):
        for name, (words, num_hostile) in VARIANTS.items():
            found = measure(options, words, num_hostile)
            results[name].append(found)
            print(f"round {number + 1}, {name}: {json.dumps(found)}", file=sys.stderr)
    print(
        f"{date.today()}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}, load "
        f"{os.getloadavg()[1]:.0f}; {options.connections} connections, {options.rounds} rounds of "
        f"{options.seconds:g} s\n"
    )
    print("| variant | images/s | p50, ms | p99, ms | not 200 | hostile requests | most memory, MB |")
    print("|---|---|---|---|---|---|---|")
    for name, rows in results.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(
            f"| {name} | {middle['per_second']:.0f} | {1000 * middle['p50']:.0f} | "
            f"{1000 * middle['p99']:.0f} | "
            f"{sum(row['not_200'] for row in rows)} | {sum(row['hostile_requests'] for row in rows)} | "
            f"{max(row['resident_mb'] for row in rows):.0f} |"
        )
    names = list(VARIANTS)
    for name in (names[0], names[2]):
        base = results[names[1] if name == names[0] else names[0]]
        pairs = zip(results[name], base, strict=True)
        ratios = sorted(one["per_second"] / other["per_second"] for one, other in pairs)
        other_name = names[1] if name == names[0] else names[0]
        print(
            f"\n{name} / {other_name}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
