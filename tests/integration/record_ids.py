"""Consume epochs on any number of ranks and write down what came; started, and killed, by test_loading.

    torchrun -m tests.integration.record_ids BACKEND NUM_WORKERS FOLDER OUT ATTEMPT

Each rank appends a line a step to `OUT/<attempt>-<rank>.jsonl`. Now and then the primary saves in
`OUT/checkpoint.json` how many steps are completed, and a later attempt goes on from there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from data_prep.manifest import load_manifest
from data_prep.storage import write_atomically
from tests.unit.train.loader_cases import NUM_TRAIN, Case, training
from train.data.loaders import build_loader
from train.distributed import distributed, exit_rank

GLOBAL_BATCH_SIZE = 24  # for one, two or three ranks
NUM_EPOCHS = 3
STEPS_PER_CHECKPOINT = 4

if __name__ == "__main__":
    backend, num_workers, folder, out, attempt = sys.argv[1:]
    checkpoint = Path(out) / "checkpoint.json"
    steps_per_epoch = NUM_TRAIN // GLOBAL_BATCH_SIZE
    with distributed(timeout_seconds=60) as ranks:
        plan = training(
            Path(folder),
            load_manifest(Path(folder)),
            Case(backend, int(num_workers)),
            ranks.rank,
            ranks.world_size,
            global_batch_size=GLOBAL_BATCH_SIZE,
            batch_size=GLOBAL_BATCH_SIZE // ranks.world_size,
        )
        loader = build_loader(backend, plan)
        step = ranks.broadcast(json.loads(checkpoint.read_text()) if checkpoint.exists() else 0)
        with (Path(out) / f"{attempt}-{ranks.rank}.jsonl").open("w", buffering=1) as record:
            while step < NUM_EPOCHS * steps_per_epoch:
                epoch, start = divmod(step, steps_per_epoch)
                for batch in loader.epoch(epoch, start * GLOBAL_BATCH_SIZE, resolution=32):
                    record.write(json.dumps({"step": step, "ids": batch.sample_ids.tolist()}) + "\n")
                    ranks.sum([1.0])  # as the reduction of gradients: all ranks have taken the step
                    step += 1
                    if step % STEPS_PER_CHECKPOINT == 0 and ranks.is_primary:
                        write_atomically(checkpoint, json.dumps(step).encode())
                    time.sleep(0.02)
        loader.close()
        ranks.barrier()
    exit_rank(0)
