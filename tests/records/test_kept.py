"""Pieces of a measurement: made once, made again if damaged or of another measurement."""

import pytest
import torch

from surgery.records.kept import Kept


def counted(kept: Kept, name: str = "piece") -> tuple[list[float], int]:
    """What is kept under a name, and how often it had to be computed."""
    calls: list[str] = []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(name)
        return {"sums": torch.arange(3, dtype=torch.float64), "whole": torch.ones(2, 2)}

    return kept.get(name, compute)["sums"].tolist(), len(calls)


def test_a_piece_is_computed_once_whoever_asks(tmp_path):
    for computed in (1, 0):
        assert counted(Kept(tmp_path / "parts", {"seed": 0, "span": (1, 2)})) == ([0.0, 1.0, 2.0], computed)
    assert counted(Kept(tmp_path / "parts", {"seed": 0, "span": (1, 2)}), "other") == ([0.0, 1.0, 2.0], 1)
    assert counted(Kept(tmp_path / "parts", {"seed": 0, "span": (1, 3)}))[1] == 1


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda _: b""]
)
def test_a_damaged_piece_is_computed_again(tmp_path, damage):
    kept = Kept(tmp_path, {})
    counted(kept)
    path = tmp_path / "piece.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert counted(kept) == ([0.0, 1.0, 2.0], 1)
    assert counted(kept)[1] == 0


def test_an_interruption_keeps_what_was_ready_and_nothing_half(tmp_path):
    kept = Kept(tmp_path / "parts", {})
    counted(kept, "first")

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.get("second", interrupt)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["first.safetensors"]
