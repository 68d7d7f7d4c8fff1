"""Several runs side by side: accuracy, cost, stability, and paired tests on the same images."""
