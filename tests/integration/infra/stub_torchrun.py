"""A stand-in for torchrun: it plays one scene a start, and leaves what training would leave.

STUB_SCENES     file with a JSON list of scenes; a start plays the next one, and the last one again and again
scene           {"status": …, "reason": …, "code": 0, "seconds": 0.0, "until": "term" | "notice" | null,
                 "summary": {…}, "words": "a line of the log"}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

told = []


def main() -> int:
    scenes_file = Path(os.environ["STUB_SCENES"])
    scenes = json.loads(scenes_file.read_text())
    if len(scenes) > 1:
        scenes_file.write_text(json.dumps(scenes[1:]))
    scene = scenes[0]
    with Path(os.environ["STUB_CALLS"]).open("a") as file:
        file.write(json.dumps({"command": "torchrun", "words": sys.argv[1:], "time": time.time()}) + "\n")
    signal.signal(signal.SIGTERM, lambda *_: told.append("term"))
    if "words" in scene:
        print(scene["words"], flush=True)
    time.sleep(scene.get("seconds", 0))
    while scene.get("until") == "term" and not told:
        time.sleep(0.02)
    while scene.get("until") == "notice" and not Path(os.environ["STUB_NOTICE"]).exists():
        time.sleep(0.02)
    run = _run_folder()
    run.mkdir(parents=True, exist_ok=True)
    if "summary" in scene:
        (run / "summary.json").write_text(json.dumps(scene["summary"]))
    if "status" in scene:
        (run / "status.json").write_text(json.dumps({"status": scene["status"], "reason": scene["reason"]}))
    return int(scene.get("code", 0))


def _run_folder() -> Path:
    words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    return Path(words["run.folder"]) / words["run.name"]


if __name__ == "__main__":
    sys.exit(main())
