"""The report of an evaluation: a page of sections, its figures as PNG, and its numbers as JSON."""
