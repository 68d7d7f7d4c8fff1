"""A run in the forms that others can use."""
