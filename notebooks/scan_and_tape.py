# %% [markdown]
# # Scan many wirings, tape one together
#
# Does a model get better if some of its layers run twice? A scan asks this of many spans at once. The best of many is
# partly lucky, so one half of the questions finds a winner and the other half measures it again.

# %%
import surgery
from surgery import scan, wiring
from surgery.corpus import probes
from surgery.stats import comparisons

stack = surgery.Stack(surgery.load("babel"))
search, validation = probes.babel(8, ks=(2, 5)).split(seed=0)
search

# %% [markdown]
# All ways to run one or two neighbouring layers twice, and what measuring them costs:

# %%
spans = [span for span in wiring.every_repeat(stack.n_layers) if span.depth <= stack.n_layers + 2]
print(scan.plan(stack, spans, search))
spans[1].draw()

# %% [markdown]
# One row for each wiring, question and metric. `comparisons.table` makes one row for each wiring of it: the gain in
# log-likelihood with its interval, and `p_max`, which allows for how many wirings were tried.

# %%
rows = scan.run(stack, spans, search)
table = comparisons.table(rows, "loglik")
table.nlargest(5, "gain")[["wiring", "gain", "gain_low", "gain_high", "p_max"]]

# %%
surgery.plot(table)

# %% [markdown]
# The same as a "brain scan": the first layer that runs twice across, the one after the last down.

# %%
scan.draw.brain_scan(table, stack.n_layers)

# %% [markdown]
# Do the winners win again on the questions that did not choose them?

# %%
best = table.nlargest(3, "gain")["wiring"].tolist()
fresh = scan.run(stack, best, validation)
comparisons.winners(rows, fresh, "loglik", top=3)[["wiring", "gain_search", "gain_validation", "verdict"]]

# %% [markdown]
# ## Tape
#
# A wiring becomes a model of its own, on the same weights: the tape holds its layers together. It can be saved as a
# checkpoint that Hugging Face opens, and loaded like any other model.

# %%
import tempfile

taped = surgery.tape.together(stack.model, best[0])
folder = surgery.tape.save(taped, tempfile.mkdtemp())
again = surgery.Stack(surgery.load(folder))
again

# %%
tokens = stack.tokens(surgery.corpus.bundled.prompts(8))
largest = (again.run(tokens) - stack.run(tokens, best[0]))[tokens.mask].abs().max().item()
assert largest < 1e-3
print(f"largest difference of a logit: {largest:.1e}")
