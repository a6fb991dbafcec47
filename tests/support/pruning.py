"""Parts of a pruning run on models and layers that a test made itself."""

from dataclasses import replace
from types import SimpleNamespace

from ssmc.compressor import pipeline
from ssmc.compressor.calibration.placement import HOST
from ssmc.compressor.methods.method import Job, KeepCounts, Plan
from ssmc.compressor.options.config import configure
from ssmc.compressor.plan import make_plan


def run_of(model, architecture, tokens, config, dtypes, stage=HOST):
    """A run on a model, with everything that follows from its sizes."""
    plan = make_plan(config, architecture, architecture.dimensions(model.config), model.config)
    return pipeline.Run(model, plan, tokens, dtypes, stage)


def prune_layers(model, architecture, tokens, config, dtypes, removed=(), stage=HOST):
    """Prune every layer of a model in place."""
    return pipeline.prune_layers(run_of(model, architecture, tokens, config, dtypes, stage), removed)


def shed(model, architecture, tokens, config, known=()):
    """Remove whole blocks or SSMs in place; the first ones may be known."""
    run = run_of(model, architecture, tokens, config, dict.fromkeys(model.state_dict()))
    return list(pipeline.prune(replace(run, removals=known)).removals)


def job_of(architecture, block, hidden, *, stream=None, config=None, index=0, keep=None):
    """One layer and what it reads, as methods get it; `keep` are the states and channels that stay."""
    config = configure(model="test") if config is None else config
    mixer = architecture.mixer(block)
    rates = architecture.rates(mixer)
    sizes = SimpleNamespace(
        d_state=rates[0].shape[1],
        d_inner=mixer.out_proj.weight.shape[1],
        groups=len(rates),
        heads=len(mixer.A_log) if mixer.A_log.dim() == 1 else None,
        n_layer=index + 1,
    )
    states, channels = keep or (sizes.d_state, sizes.d_inner)
    counts = KeepCounts((states,) * (index + 1), (channels,) * (index + 1))
    return Job(Plan(config, architecture, sizes, counts), block, index, hidden, stream)
