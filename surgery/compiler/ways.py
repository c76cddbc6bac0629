"""The ways to heal a compiled model; ``surgery.compiler.heal`` defines them.

They stand in a module of their own so that the command line can list them without importing torch.
"""

NORMS, LOW_RANK = "norms", "low rank"
WAYS = (NORMS, LOW_RANK)
