"""A network's representation against people's: Procrustes fit, regression, representational similarity."""
