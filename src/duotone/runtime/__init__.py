"""Files to a running model."""
