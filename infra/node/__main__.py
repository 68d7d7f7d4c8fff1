"""Command line of the agent: no arguments, all of it is in the environment (see settings.py).

python -m infra.node        # on an instance, started by sprint-bootstrap

Its exit code says nothing: the verdict does, in /run/sprint/verdict.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def main() -> int:
    from infra.aws import Aws
    from infra.errors import UserError
    from infra.node.agent import Agent
    from infra.node.metadata import Metadata
    from infra.node.settings import read_settings
    from infra.node.store import Store
    from infra.node.verdict import Verdict

    # S3 is asked more patiently here than on a laptop: nobody looks on.
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "6")
    metadata = Metadata(os.environ)
    try:
        settings = read_settings(os.environ, metadata)
        settings.logs.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(filename=settings.logs / "agent.log", level=logging.INFO, format=LOG_FORMAT)
        for loud in ("boto3", "botocore", "urllib3"):
            logging.getLogger(loud).setLevel(logging.WARNING)
        agent = Agent(settings, Store(Aws(settings.region or None), settings.bucket), metadata)
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        root = Path(os.environ.get("SPRINT_ROOT") or "/")
        Verdict("end", "failed", f"the agent cannot start: {error}").write(root / "run/sprint/verdict")
        return 1
    signal.signal(signal.SIGTERM, agent.interrupts.on_signal)
    signal.signal(signal.SIGINT, agent.interrupts.on_signal)
    verdict = agent.run()
    verdict.write(settings.verdict)
    print(f"verdict: {verdict.action} ({verdict.status}): {verdict.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
