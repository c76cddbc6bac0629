"""The tables and figures that ``surgery compile`` leaves in a folder."""

from surgery.compiler import draft_speed, frontier, heal, speed

FRONTIER, HEAL = "compile_frontier.csv", "compile_heal.csv"
SPEED, DRAFT = "compile_speed.csv", "compile_draft.csv"
COLUMNS: dict[str, dict[str, str]] = {
    FRONTIER: frontier.COLUMNS,
    HEAL: heal.COLUMNS,
    SPEED: speed.COLUMNS,
    DRAFT: draft_speed.COLUMNS,
}
CAPTIONS = {
    "compile": "Left, the loss that saving layers in a row adds on fresh texts, by how they are saved; bars hold for "
    "all that was searched at once; dotted, what is allowed. Right, where it was timed, tokens a second as a multiple "
    "of the original's, beside the floor that the number of layers, bytes and operations set.",
    "compile_floor": "What saving a quarter of the layers in a row can gain at most, by the width of the model: on "
    "this machine as measured, and on a GPU as its data sheet says. Where weights or operations decide, it gains "
    "nothing.",
}
