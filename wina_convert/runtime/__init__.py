"""What a loaded WINA model runs. Small, and imports nothing of the package but `format` and `errors`."""
