"""From a source folder to a published checkpoint: `pipeline.convert` is the straight line, each other file a step of it."""
