"""Recipe → torchrun DDP training → checkpoints, metrics and an MLflow run."""
