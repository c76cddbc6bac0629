"""Residual-stream layer surgery on TransformerLens models: measure, rewire, rebuild.

``surgery.load`` opens a model, ``surgery.Stack`` takes it apart into ``embed -> layers -> readout``, ``surgery.Wiring``
says in which order its layers run. Every verb lives in its module: ``surgery.series.windows(stack, tokens)``.

Nothing is imported before it is used, so ``import surgery`` costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.models import load as load
    from surgery.stack import Stack as Stack
    from surgery.wiring import Wiring as Wiring

__version__ = "0.1.0"
__all__ = ["Stack", "Wiring", "load"]

_VALUES = {"load": "surgery.models", "Stack": "surgery.stack", "Wiring": "surgery.wiring"}
_MODULES = (
    "ablation",
    "anatomy",
    "anatomy_figures",
    "anatomy_study",
    "attribution",
    "babel",
    "border",
    "calibration",
    "cli",
    "cluster",
    "comparisons",
    "composition",
    "contrast",
    "controls",
    "convergence",
    "coordinates",
    "dependence",
    "depth",
    "directions",
    "displacement",
    "drift",
    "dropout",
    "effects",
    "engine",
    "ensemble",
    "evaluate",
    "features",
    "fidelity",
    "figures",
    "findings",
    "frames",
    "gates",
    "graft",
    "graft_study",
    "harvest",
    "hooks",
    "interactions",
    "jacobians",
    "latents",
    "layout",
    "ledger",
    "lens",
    "linear_maps",
    "lines_of_thought",
    "manifold",
    "mask_ensemble",
    "measures",
    "models",
    "muon",
    "opening",
    "ou",
    "panels",
    "perceptrons",
    "probes",
    "prompts",
    "provenance",
    "pruning",
    "questions",
    "readout",
    "redundancy",
    "regression",
    "regions",
    "reinitialise",
    "report",
    "resize",
    "returns",
    "reversion",
    "reversion_figures",
    "reversion_findings",
    "reversion_study",
    "scan",
    "scan_figures",
    "scan_findings",
    "scan_study",
    "schedule",
    "search",
    "segmentation",
    "sentences",
    "series",
    "similarity",
    "stability",
    "stability_figures",
    "sizing",
    "stack",
    "stats",
    "study",
    "superposition",
    "superposition_findings",
    "sweep",
    "tape",
    "tokens",
    "training",
    "trajectories",
    "walk",
    "walk_study",
    "width",
    "wiring",
)


def __getattr__(name: str) -> Any:
    if name in _VALUES:
        return getattr(importlib.import_module(_VALUES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"surgery.{name}")
    raise AttributeError(f"module 'surgery' has no attribute {name!r}; it has {', '.join([*__all__, *_MODULES])}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
