"""Cross-validation: a training a fold, and each training image judged by a model that never saw it."""
