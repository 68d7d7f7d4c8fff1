"""Label audit: which labels of a split are probably wrong, by confident learning."""
