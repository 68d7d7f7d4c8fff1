"""The cloud: what a run costs, the machines it gets, what they do, and that they end: `python -m infra`."""
