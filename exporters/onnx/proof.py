"""What is found out about a graph that was just written: that it is the model, and what float16 or int8 cost."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ssmc.exporters.format import Job
from ssmc.exporters.onnx.quality import measure
from ssmc.exporters.onnx.running import open_written
from ssmc.exporters.onnx.verify import differences, prove
from ssmc.exporters.onnx.write import ON_THE_WAY, proven_folder
from ssmc.exporters.quality import Quality
from ssmc.exporters.verify import Comparison, Way, cut_epsilons


@dataclass(frozen=True)
class GraphDetails:
    """What was found out.

    Attributes:
        ways: the ways of running the float32 graph one by one.
        rounding: the same of the float16 or int8 graph; empty for a float32 one.
        quality: perplexity before and after float16 or int8; None for a float32 graph.
    """

    ways: tuple[Way, ...]
    rounding: tuple[Way, ...] = ()
    quality: Quality | None = None


def prove_written(job: Job, folder: Path) -> tuple[Comparison, GraphDetails]:
    """Run the graphs in a folder beside the model they were made from; what is only there to be proven goes.

    Raises:
        VerificationError: they compute something else.
    """
    checkpoint, tokens = job.source.checkpoint, job.tokens
    moved = cut_epsilons(checkpoint, job.shrunk.config, tokens.sample)
    first = open_written(proven_folder(job, folder))
    comparison, ways = prove(checkpoint.model, first, tokens.sample, tokens.real)
    del first
    for name in ON_THE_WAY:
        shutil.rmtree(folder / name, ignore_errors=True)
    comparison = replace(comparison, epsilon_difference=moved)
    if not job.options.lossy:
        return comparison, GraphDetails(tuple(ways))
    rounding = differences(checkpoint.model, open_written(folder), tokens.sample)
    quality = measure(checkpoint.model, folder, tokens.stream, tokens.source, job.progress)
    return comparison, GraphDetails(tuple(ways), tuple(rounding), quality)
