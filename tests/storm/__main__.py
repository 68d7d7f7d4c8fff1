"""Train under random faults, compare with calm runs, print a table; arguments only.

    python -m tests.storm --minutes 10
    python -m tests.storm --minutes 60 --seed 7 --out storm.md
    python -m tests.storm --rounds 1 --faults 6 --only rank,sigterm,flip
    python -m tests.storm --list

Exit status: 0 where every fault was survived and every end was that of the calm run; else 1, and the folder
with runs and logs stays.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.storm.service_faults import BY_KEY, FAULTS, WAITING
from tests.storm.storm import Options, storm


def _keys(text: str) -> list[str]:
    keys = [key for key in text.split(",") if key]
    if unknown := [key for key in keys if key not in BY_KEY]:
        raise argparse.ArgumentTypeError(f"no such kind: {', '.join(unknown)} (--list names all)")
    return keys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__.split(";")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="no round begins that would end later")
    parser.add_argument("--rounds", type=int, help="so many trainings, however long they take")
    parser.add_argument("--faults", type=int, default=10, help="of a training at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=_keys, default=[], metavar="KIND,…")
    parser.add_argument("--without", type=_keys, default=[], metavar="KIND,…")
    parser.add_argument("--loaders", help="e.g. reference,ffcv; all that are installed")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the table there, too")
    parser.add_argument("--folder", type=Path, help="for runs and logs; it stays")
    parser.add_argument("--list", action="store_true", help="name the kinds of faults")
    words = parser.parse_args()
    if words.list:
        for fault in FAULTS:
            waits = f"  (waits for {WAITING[fault.key]})" if fault.key in WAITING else ""
            print(f"{fault.key:18}{fault.kind}{waits}")
        return 0
    keys = words.only or [fault.key for fault in FAULTS if fault.key not in WAITING]
    options = Options(
        kinds=[key for key in keys if key not in words.without],
        minutes=words.minutes,
        rounds=words.rounds,
        faults_a_round=words.faults,
        seed=words.seed,
        loaders=words.loaders.split(",") if words.loaders else None,
        out=words.out,
        folder=words.folder,
    )
    return storm(options, "python -m tests.storm " + " ".join(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
