"""The tables that ``surgery compile`` leaves in a folder."""

from surgery.compiler import draft_speed, frontier, speed

FRONTIER, SPEED, DRAFT = "compile_frontier.csv", "compile_speed.csv", "compile_draft.csv"
COLUMNS: dict[str, dict[str, str]] = {FRONTIER: frontier.COLUMNS, SPEED: speed.COLUMNS, DRAFT: draft_speed.COLUMNS}
CAPTION = (
    "Left, the loss that saving layers in a row adds on fresh texts, by how they are saved; bars hold for all that was "
    "searched at once; dotted, what is allowed. Right, where it was timed, tokens a second as a multiple of the "
    "original's, beside the floor that the number of layers, bytes and operations set."
)
