"""Statistics of a model to what is stored about it: thresholds, and bases in which more can be skipped."""
