"""The agent on an instance, from its data to its verdict: `python -m infra.node`, from sprint-bootstrap."""
