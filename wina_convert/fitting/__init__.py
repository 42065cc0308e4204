"""From what a model computes on text to what a checkpoint stores: scores, budget, thresholds. Knows no files."""
