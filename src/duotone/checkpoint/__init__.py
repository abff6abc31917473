"""Tensors to files and back: safetensors shards, INT4 packing, storage formats. Knows no model class."""
