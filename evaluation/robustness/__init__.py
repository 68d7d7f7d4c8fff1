"""Accuracy under ImageNet-C-style corruptions: `corruptions` makes them, `measure` counts."""
