"""Will data or model be the limit? `python -m train.data.preflight RECIPE` says so before anybody pays.

`measure.py` times loader and model, `machine.py` looks at memory and disk, `levers.py` tries out what would
help, `figures.py` and `verdict.py` draw conclusions, `quick.py` is the one line that a training prints.
"""

from train.data.preflight.figures import training_resolutions
from train.data.preflight.quick import quick_preflight

__all__ = ["quick_preflight", "training_resolutions"]
