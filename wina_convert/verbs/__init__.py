"""What one does with a checkpoint, a file for each verb of `wina`. The command line prints what these return."""
