"""The short name of ``surgery.rebuild.tape``: make a wiring permanent, save it, ask a taped model for its origin."""

from surgery.rebuild.tape import base_of as base_of
from surgery.rebuild.tape import save as save
from surgery.rebuild.tape import together as together
from surgery.rebuild.tape import wiring_of as wiring_of
