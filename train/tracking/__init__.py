"""Where a run's figures go: metrics.jsonl always, MLflow where wanted, the console on the primary rank."""
