# %% [markdown]
# # Quantize a model from Python
#
# The verbs of the command line are functions of `shardq`. They take the same options, raise its errors, and return
# what a command prints as its last line. This file runs as it is, `python docs/examples/quantize.py`, and opens as a
# notebook in editors that know cells of `%%` comments.

# %%
import shardq

MODEL = "HuggingFaceTB/SmolLM2-135M"  # a folder or a hub name
OUTPUT = "runs/smollm2-w4"
CALIBRATION = {"samples": 32, "sequence_length": 512}  # of the default text
EVALUATION = {"samples": 16, "sequence_length": 512}
OPTIMIZE = {"iterations": 64}

# %% [markdown]
# ## Quantize
#
# Options are keyword arguments; a section, such as `--calib.samples` belongs to, is a dict or one of the option
# dataclasses. The call may be interrupted: the same call goes on after the blocks that are finished.

# %%
summary = shardq.quantize(
    MODEL,
    output=OUTPUT,
    quant={"bits": 4},
    calib=CALIBRATION,
    optimize=OPTIMIZE,
)
print(f"{summary['blocks']} blocks in {summary['seconds']:.0f} s")

# %% [markdown]
# ## Look at the result
#
# `load_run` gives the blocks with their losses, times and grids, also of a run that is not finished. Codes and scales
# are read when they are asked for.

# %%
run = shardq.load_run(OUTPUT)
for block in run.blocks:
    losses = {name: round(value, 5) for name, value in block.facts.items() if name.endswith(("before", "after"))}
    print(block.name, losses, f"{sum(block.seconds.values()):.1f} s, {block.num_bytes} bytes")

# %%
name, matrix = next(iter(run.blocks[0].matrices().items()))
print(name, matrix.grid)
print("codes [out, in]", tuple(matrix.codes_OI.shape), matrix.codes_OI[0, :8].tolist())
print("scales [out, groups]", tuple(matrix.scale_OG.shape))
print("weights", run.blocks[0].weights()[name][0, :4])

# %% [markdown]
# ## Measure it

# %%
for model in (MODEL, OUTPUT):
    measured = shardq.evaluate(model, eval=EVALUATION)
    print(f"{model}: perplexity {measured['perplexity']:.2f} over {measured['tokens']} tokens")

# %% [markdown]
# ## Export it, and check what was written
#
# The folder itself is a checkpoint that vLLM and transformers load; other programs have their own formats.

# %%
exported = shardq.export(OUTPUT, format="gptq")
print(exported["output"], exported["bytes"], "bytes")
print(shardq.verify(OUTPUT))

# %% [markdown]
# ## Errors
#
# A value that cannot work is refused before work starts, by one line that says what is allowed.

# %%
try:
    shardq.quantize(MODEL, output=OUTPUT, quant={"bit": 4})
except shardq.ShardQError as error:
    print(error)
