"""What the rest of a model must know once experts are gone from its layers."""

from __future__ import annotations

import copy

from ssmc.compressor.methods.method import Survey
from ssmc.compressor.methods.units.counts import units_to_keep
from ssmc.compressor.options.patterns import EXPERT
from ssmc.runtime.models.architectures.experts import Experts


def tell_experts(survey: Survey) -> None:
    """Tell the model's configuration how many experts there are, and give layers that were skipped as many."""
    plan, model = survey.plan, survey.model
    config = copy.deepcopy(plan.model_config)
    for part in plan.architecture.units:
        if not isinstance(part, Experts) or not part.total(config):
            continue
        keep = units_to_keep(part, plan.model_config, plan.config.sparsity_of(EXPERT))
        for block in plan.architecture.blocks(model):
            module = part.inside(block)
            if module is not None and len(module.experts.down_proj) > keep:
                part.remove(module, part.some(plan.model_config, keep))
        part.resize(config, part.some(plan.model_config, keep))
    model.config = config
    model.base_model.config = config
