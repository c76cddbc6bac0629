"""Where the modules of version 0.1.0 are now: a script written for it is told what to import instead."""

import sys
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

MOVED = {  # old name below ``surgery`` -> new name
    "ablation": "instruments.ablation",
    "anatomy_figures": "anatomy.draw",
    "anatomy_study": "anatomy.study",
    "attribution": "series.attribution",
    "babel": "corpus.babel",
    "border": "models.stream_width",
    "calibration": "instruments.known_networks",
    "cluster": "scan.cluster",
    "comparisons": "stats.comparisons",
    "composition": "series.composition",
    "contrast": "anatomy.ends_against_middle",
    "controls": "scan.controls",
    "convergence": "anatomy.convergence",
    "coordinates": "instruments.coordinates",
    "dependence": "instruments.windows",
    "depth": "series.effective_depth",
    "directions": "reversion.directions",
    "displacement": "instruments.displacement",
    "drift": "stats.drift",
    "dropout_models": "dropout.trained",
    "dropout_report": "dropout.chapter",
    "dropout_study": "dropout.study",
    "effects": "series.effects",
    "engine": "models.engine",
    "ensemble": "instruments.ensemble",
    "evaluate": "scan.harness",
    "export": "rebuild.checkpoint",
    "features": "dropout.features",
    "fidelity": "instruments.fidelity",
    "figures": "page.drawing",
    "findings": "page.phrases",
    "foreign": "wiring.formats",
    "frames": "records.tables",
    "gates": "series.gates",
    "graft_report": "graft.chapter",
    "graft_study": "graft.study",
    "harvest": "training.harvest",
    "interactions": "instruments.interactions",
    "jacobians": "series.jacobians",
    "latents": "training.activations",
    "layout": "rebuild.layout",
    "ledger": "training.ledger",
    "lens": "instruments.lens",
    "linear_maps": "graft.linear_maps",
    "lines_of_thought": "reversion.cloud",
    "manifold": "graft.manifold",
    "mask_ensemble": "dropout.mask_ensemble",
    "measures": "series.side_by_side",
    "middle_report": "graft.middle_chapter",
    "muon": "training.muon",
    "notation": "wiring.notation",
    "opening": "models.opening",
    "ou": "stats.ou",
    "panels": "stats.panels",
    "perceptrons": "dropout.perceptrons",
    "probes": "corpus.probes",
    "prompts": "corpus.text_files",
    "provenance": "records.manifest",
    "pruning": "rebuild.units",
    "questions": "corpus.questions",
    "readout": "instruments.readout",
    "redundancy": "dropout.redundancy",
    "regions": "training.regions",
    "regression": "instruments.regression",
    "reinitialise": "graft.reinitialise",
    "resize": "rebuild.weights",
    "returns": "reversion.returns",
    "reversion_figures": "reversion.draw",
    "reversion_findings": "reversion.say",
    "reversion_study": "reversion.study",
    "scan_figures": "scan.draw",
    "scan_findings": "scan.say",
    "scan_study": "scan.study",
    "schedule": "scan.schedule",
    "search": "scan.search",
    "segmentation": "stats.changepoints",
    "sentences": "corpus.parallel_sentences",
    "similarity": "instruments.similarity",
    "sizing": "models.layer_sizes",
    "slots": "rebuild.passes",
    "stability": "dropout.stability",
    "stability_figures": "dropout.draw",
    "stack": "models.stack",
    "steps": "wiring.steps",
    "superposition": "dropout.toy_model",
    "superposition_findings": "dropout.say",
    "sweep": "graft.size_study",
    "tokens": "models.tokens",
    "trajectories": "reversion.trajectories",
    "walk": "graft.walk",
    "walk_study": "graft.walk_study",
    "width": "rebuild.width",
}


def advice(name: str) -> str:
    """What to import instead of the module that ``surgery.<name>`` was."""
    return f"surgery.{name} has moved: import surgery.{MOVED[name]}"


class Signpost(MetaPathFinder):
    """Raises ImportError with ``advice`` where a moved module is imported, and finds nothing else."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> None:
        package, _, name = fullname.rpartition(".")
        if package == "surgery" and name in MOVED:
            raise ImportError(advice(name), name=fullname)


def put_up() -> None:
    """Let Python ask the signpost last, once a process."""
    if not any(isinstance(finder, Signpost) for finder in sys.meta_path):
        sys.meta_path.append(Signpost())
