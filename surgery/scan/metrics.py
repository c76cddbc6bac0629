"""The names of the metrics that a scan can take; ``surgery.scan.scores`` defines them.

They stand in a module of their own so that the command line can list them without importing torch.
"""

METRICS = ("loglik", "exact", "credit", "loss", "kl", "choice")
