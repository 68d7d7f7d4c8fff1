"""The web page on which people try a classifier: Gradio, `serve.portable`, NumPy, Pillow, no more.

`python -m serve demo` shows it, and every Space made by `python -m serve space` has a copy of this folder.
"""

import os

# Read by Gradio when it is imported: no telemetry, no look for newer versions, no record of what was tried.
for _name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
    os.environ.setdefault(_name, "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
