# %% [markdown]
# # Hooks, wirings and streams
#
# A transformer adds one update after another to a stream of vectors. What if some layers read the same stream instead
# of waiting for each other, or run twice, or not at all? This notebook asks a small model that comes with `surgery`.

# %%
import surgery

model = surgery.load("babel")  # or a folder, a .gguf file, a name on the Hugging Face hub, a model in memory
stack = surgery.Stack(model)
stack

# %% [markdown]
# `babel` translates words between made-up languages and applies functions to them on the way. Its prompts end with
# `>` and the language of the answer.

# %%
texts = surgery.corpus.bundled.prompts(24)
tokens = stack.tokens(texts)
print(*texts[:3], sep="\n")
tokens

# %% [markdown]
# ## Hooks in TransformerLens
#
# `surgery.load` returns TransformerLens' own `TransformerBridge`, and an intervention is a list of its hooks. Here
# layers 4 to 7 all read the stream that enters layer 4.

# %%
with model.hooks(fwd_hooks=surgery.hooks.parallel(model, 4, 8)):
    in_parallel, cache = model.run_with_cache(tokens.ids)
cache["blocks.7.hook_out"].shape

# %% [markdown]
# ## Wirings
#
# A `Stack` runs layers in any order, also twice, which hooks cannot. The order is a `Wiring`, written like slices.

# %%
wiring = surgery.Wiring.parse(":4 {*4:8} 8:", stack.n_layers)
wiring.draw()

# %% [markdown]
# Both ways give the same logits.

# %%
largest = (stack.run(tokens, wiring) - in_parallel)[tokens.mask].abs().max().item()
assert largest < 1e-3
print(f"largest difference of a logit: {largest:.1e}")

# %% [markdown]
# A span can also run twice, in reverse, or damped.

# %%
surgery.Wiring.of(stack.n_layers).repeat(4, 8).reverse(0, 3).scale(-2, 14 + 2, 0.5).draw()

# %% [markdown]
# ## How serial are the layers?
#
# `S` is 0 where the layers of a window do not read each other and 1 where each lives on the one before. The table says
# what its columns mean, and `surgery.plot` draws any table of ours; hover over a cell to see its whole row.

# %%
windows = surgery.series.windows(stack, tokens, max_length=3, sampling=surgery.Sampling(resamples=100))
windows.attrs["columns"]["S"]

# %%
surgery.plot(windows)

# %% [markdown]
# The figures of the reports are matplotlib's. They show without `%matplotlib inline`.

# %%
surgery.series.draw.windows(windows)

# %% [markdown]
# What may be claimed from the table, in sentences:

# %%
print(*surgery.series.say.windows(windows), sep="\n")
