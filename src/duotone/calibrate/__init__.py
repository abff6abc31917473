"""Text to token windows, and token windows through one block at a time, feeding statistics."""
