"""`python -m train` with a disk for each rank, as on machines that share none:

torchrun -m tests.integration.train_apart FOLDER RECIPE …      # works in FOLDER/machine<rank>
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from train.__main__ import main
from train.distributed import exit_rank

if __name__ == "__main__":
    place = Path(sys.argv[1]) / f"machine{os.environ['RANK']}"
    place.mkdir(exist_ok=True)
    os.chdir(place)
    exit_rank(main(sys.argv[2:]))
