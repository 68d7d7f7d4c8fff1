"""`python -m serve demo`: the page of `serve.page` for the runs of this machine or of MLflow."""
