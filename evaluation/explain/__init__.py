"""What in an image a model looks at: `grad_cam` for the maps, `capture` and `feature_map` below it."""
