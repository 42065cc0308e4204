"""A WINA folder on the disk: names, config, headers, tensors, hashes. Needs no model, and nothing above it in the package."""
