"""Backends of the W4A8 linear, chosen by a pure function; the reference is the specification."""
