"""Small models that differ in their dropout alone: same seeds, exact resumption, matched loss, one file to ship."""

import pytest
import torch
from safetensors.torch import save_file

from surgery import dropout
from surgery.dropout import perceptrons, say, trained
from surgery.dropout.trained import Recipe, TrainedModel
from surgery.models.loading import plain

SMALL = {"n_layers": 2, "d_model": 16, "d_mlp": 32, "n_heads": 2, "steps": 4, "every": 2}
TOKENS = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_no_dropout_is_no_change_and_a_seed_draws_the_masks():
    model = trained.build(Recipe(**SMALL)).eval()
    plain = logits(model)

    def dropped(rate, seed):
        with trained.dropout_on(model, rate, seed):
            return logits(model)

    assert torch.equal(dropped(0.0, 1), plain)
    assert torch.equal(dropped(0.5, 1), dropped(0.5, 1))
    assert not torch.equal(dropped(0.5, 1), dropped(0.5, 2))
    assert torch.equal(logits(model), plain)


def test_expectation_of_what_is_dropped_is_what_was_there():
    model, before, after = trained.build(Recipe(**SMALL)).eval(), [], []
    neurons = model.model.layers[0].mlp.down_proj
    own = neurons.forward
    neurons.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    neurons.forward = lambda x: (after.append(x), own(x))[1]  # behind the mask, which comes between hooks and matrix
    for seed in range(100):
        with trained.dropout_on(model, 0.4, seed):
            logits(model)
    plain, masked = torch.stack(before), torch.stack(after)
    assert set((masked / plain * 0.6).round(decimals=3).unique().tolist()) == {0.0, 1.0}
    assert (masked != 0).float().mean() == pytest.approx(0.6, abs=0.01)


def test_stopped_and_gone_on_is_uninterrupted(tmp_path, monkeypatch):
    recipe = Recipe(rate=0.3, seed=1, **SMALL)
    whole = trained.train(recipe, tmp_path / "whole")
    look, looks = trained._Task.evaluate, []

    def stop(task):
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt
        return look(task)

    monkeypatch.setattr(trained._Task, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        trained.train(recipe, tmp_path / "stopped")
    monkeypatch.setattr(trained._Task, "evaluate", look)
    again = trained.train(recipe, tmp_path / "stopped")
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in whole.weights.items())
    assert not any(dropout.live(again.stack().model))


def test_models_of_a_seed_begin_alike_and_rates_part_them(tmp_path):
    begun = [trained.build(Recipe(rate=rate, seed=2, **SMALL)).state_dict() for rate in (0.0, 0.4)]
    assert all(torch.equal(tensor, begun[1][name]) for name, tensor in begun[0].items())
    ended = [trained.train(Recipe(rate=rate, seed=2, **SMALL), tmp_path / str(rate)) for rate in (0.0, 0.4)]
    assert not torch.equal(*(one.weights["model.layers.0.mlp.up_proj.weight"] for one in ended))


def test_loss_is_matched_at_the_lowest_rung_that_all_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "LADDER", (9.0, 8.0, 1e-3))
    made = [trained.train(Recipe(rate=rate, **SMALL), tmp_path / f"{rate}") for rate in (0.0, 0.2)]
    assert trained.matched_loss(made) == 8.0
    first = made[0].stack(loss=8.0).model.state_dict()["embed.weight"]
    begun = trained.build(made[0].recipe).state_dict()["model.embed_tokens.weight"]
    assert torch.allclose(first, begun, atol=1e-3)  # it was reached before the first step
    with pytest.raises(ValueError, match=r"p0_0 was not kept at a loss of 2\.0: it reached 8\.0, 9\.0"):
        made[0].stack(loss=2.0)
    with pytest.raises(ValueError, match="no loss of 9 or less was reached by all"):
        trained.matched_loss([made[0], TrainedModel(made[1].recipe, made[1].weights, {}, made[1].curve)])

    trained.ship(made, tmp_path / "models.safetensors")
    shipped = trained.load_shipped(tmp_path / "models.safetensors")
    assert [one.recipe for one in shipped] == [one.recipe for one in made]
    assert trained.matched_loss(shipped) == 8.0
    a, b = (torch.log_softmax(one.stack().run(TOKENS), -1) for one in (made[1], shipped[1]))
    assert torch.allclose(a, b, atol=1e-2)


def test_curves_are_what_stability_reads(tmp_path):
    made = [trained.train(Recipe(rate=rate, **SMALL | {"every": 1}), tmp_path / f"{rate}") for rate in (0.0, 0.4)]
    frame = trained.curves(made)
    assert set(perceptrons.COLUMNS) - set(frame.columns) <= {"variance_training"}
    assert len(frame) == 2 * 5 * 3
    ends = frame.groupby("layer")[["variance", "gradient"]].count()
    assert ends.values.tolist() == [[0, 10], [10, 10], [10, 0]]
    assert any("variance" in sentence for sentence in say.stability(frame))


def test_what_cannot_be_asked(tmp_path):
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match="0 or more and below 1"):
            Recipe(rate=rate)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold models of this kind"):
        trained.load_shipped(tmp_path / "other.safetensors")


def test_bundled_models_are_what_their_curves_say():
    made = trained.load_shipped()
    assert {(one.recipe.rate, one.recipe.seed) for one in made} == {
        (rate, seed) for rate in trained.RATES for seed in trained.SEEDS
    }
    loss = trained.matched_loss(made)
    for one, rung in ((made[0], None), (made[3], loss)):
        found = trained.scores(plain(one.stack(rung).model), trained.data())
        said = one.curve["loss"].iloc[-1] if rung is None else one.curve["loss"][one.curve["loss"] <= loss].iloc[0]
        assert found["loss"] == pytest.approx(said, abs=5e-3)
