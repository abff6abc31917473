"""Folds that leave the model's function as it is and make its weights easier to quantize."""
