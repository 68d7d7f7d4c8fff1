"""A storm: rounds until the time is over, and a deck of faults that is shuffled again when it is empty."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tests.storm.faults import Fault
from tests.storm.rounds import Round, build_data, installed_loaders
from tests.storm.service_faults import BY_KEY
from tests.storm.services import Services, unavailable
from tests.storm.table import Tally, markdown

CALM_PART_SECONDS = 45.0  # of a round: the calm run, the first start, the end; before one was measured
FAULT_SECONDS = 15.0  # the same of a fault
END_SECONDS = 20.0  # from the last fault to the end of a round
LEAST_FAULTS = 3  # of a round that is worth its calm run


@dataclass
class Options:
    """What is wanted."""

    kinds: list[str]
    minutes: float = 10.0
    rounds: int | None = None  # instead of the minutes
    faults_a_round: int = 10
    seed: int = 0
    loaders: list[str] | None = None
    out: Path | None = None
    folder: Path | None = None


def storm(options: Options, command: str) -> int:
    """Run it; the exit status."""
    # As Ctrl-C does: everything is taken down on the way out.
    signal.signal(signal.SIGTERM, _interrupt)
    tally = Tally(command)
    began = time.monotonic()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="storm-"))
    folder.mkdir(parents=True, exist_ok=True)
    is_interrupted = False
    try:
        faults = _available([BY_KEY[key] for key in options.kinds])
        _rounds(options, faults, folder.resolve(), tally, began)
    except KeyboardInterrupt:
        is_interrupted = True
        _say("interrupted")
    finally:
        tally.wall_seconds = time.monotonic() - began
    text = markdown(tally)
    print("\n" + text, flush=True)
    if options.out is not None:
        options.out.write_text(text)
    is_good = tally.is_good and not is_interrupted
    if not is_good or options.folder is not None:
        _say(f"runs and logs are in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if is_good else 130 if is_interrupted else 1


def _rounds(options: Options, faults: list[Fault], folder: Path, tally: Tally, began: float) -> None:
    chooser = random.Random(options.seed)
    loaders = options.loaders or installed_loaders()
    deck = _deck(faults, chooser)
    wanted = {fault.needs for fault in faults if fault.needs}
    data = build_data(folder)
    calm_part, fault_seconds = CALM_PART_SECONDS, FAULT_SECONDS
    number = 0
    left_over: list[Fault] = []
    with Services(folder, wanted) as services:
        while True:
            num_faults = options.faults_a_round
            if options.rounds is None:
                left = 60 * options.minutes - (time.monotonic() - began)
                num_faults = min(num_faults, int((left - calm_part) / fault_seconds))
                if num_faults < LEAST_FAULTS and number:
                    return
                num_faults = max(num_faults, LEAST_FAULTS)
            elif number == options.rounds:
                return
            number += 1
            at, before = time.monotonic(), len(tally.outcomes)
            loader = loaders[(number - 1) % len(loaders)]
            seed = chooser.randrange(2**31)
            drawn = [*left_over, *(next(deck) for _ in range(num_faults - len(left_over)))][:num_faults]
            one = Round(folder / f"round-{number:03d}", data, loader, seed, drawn, services, tally, _say)
            if options.rounds is None:
                one.until = began + 60 * options.minutes - END_SECONDS
            one.run()
            left_over = one.left
            done = max(1, len(tally.outcomes) - before)
            fault_seconds = 0.5 * fault_seconds + 0.5 * max(1.0, time.monotonic() - at - calm_part) / done
            if not tally.faults_of_rounds and options.folder is None:
                shutil.rmtree(folder / f"round-{number:03d}", ignore_errors=True)


def _deck(faults: list[Fault], chooser: random.Random) -> Iterator[Fault]:
    """Every kind once in some order, and again in another one, without end."""
    while True:
        yield from chooser.sample(faults, len(faults))


def _available(faults: list[Fault]) -> list[Fault]:
    kept = []
    for fault in faults:
        reason = unavailable(fault.needs) if fault.needs else None
        if reason is None:
            kept.append(fault)
        else:
            _say(f"without {fault.key}: {reason}")
    if not kept:
        raise SystemExit("no kind of fault is left")
    return kept


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
