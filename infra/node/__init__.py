"""The agent on an instance, from its data to its verdict: `python -m infra.node`, started by sprint-bootstrap."""
