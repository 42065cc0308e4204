"""Causal LMs to convert and to measure: where they are found, how they run one decoder layer at a time, the text they read."""
