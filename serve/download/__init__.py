"""Runs from elsewhere, and models in MLflow's registry."""
