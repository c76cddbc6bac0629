"""The tables that a study of dropout leaves in a folder: their file names and the meaning of their columns."""

from surgery.dropout import features, mask_ensemble, perceptrons, redundancy, toy_model, trained
from surgery.dropout.verdicts import ACROSS, CONFIRMED, WITHIN, measures_of

MODELS, PROBES, ENSEMBLE = "dropout_models.csv", "dropout_probes.csv", "dropout_ensemble.csv"
CONFIRMATION = "dropout_confirmation.csv"
PERCEPTRONS, STREAM, TOY = "dropout_perceptrons.csv", "dropout_stream.csv", "dropout_toy.csv"

RUN = {
    "rate": "probability p that a unit was dropped in training",
    "seed": "of first weights, batches and masks",
    "matched": "what is equal between rates: steps, or (held-out) loss",
}
COLUMNS: dict[str, dict[str, str]] = {
    MODELS: RUN
    | trained.COLUMNS
    | {name: features.COLUMNS[name] for name in (*measures_of(WITHIN), "explained", "dead")}
    | {name: redundancy.COLUMNS[name] for name in measures_of(ACROSS)},
    CONFIRMATION: RUN | {"loss": trained.COLUMNS["loss"]} | {name: redundancy.COLUMNS[name] for name in CONFIRMED},
    PROBES: RUN
    | {
        "probe": "what is dropped at test time: layers (stochastic depth) or neurons",
        "p": "probability of that",
        "excess": "held-out loss of answers above that of the model with nothing dropped (nats per answer token)",
    },
    ENSEMBLE: RUN | {"p": "probability that a neuron is dropped at test time"} | mask_ensemble.COLUMNS,
    PERCEPTRONS: perceptrons.COLUMNS,
    STREAM: perceptrons.COLUMNS,
    TOY: toy_model.COLUMNS,
}
