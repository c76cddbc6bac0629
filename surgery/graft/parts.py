"""What a graft may train, by name, from least to most; a module of its own that does not import torch."""

PARTS = ("middle", "junction", "all")
