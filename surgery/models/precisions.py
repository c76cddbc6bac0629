"""In which numbers the layers of a scan run; a module of its own that does not import torch."""

PRECISIONS = ("float32", "bf16")  # float32: as the model was loaded
