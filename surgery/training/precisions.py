"""The number formats to train and store in, by name; a module of its own that does not import torch."""

MIXED = ("no", "bf16", "fp16")  # what accelerate calls mixed precision
STORED = ("float16", "bfloat16", "float32")  # of activations on disk, as torch calls them
WEIGHTS = ("float32", "float64", "bfloat16", "float16")  # of a model that is measured
TRAINED = ("float32", "float64")  # of a model that is trained; see MIXED for half precision
