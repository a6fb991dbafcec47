"""Perplexity and lm-eval's tasks of several models side by side, each with its difference to the first one.

report = evaluate_models(["tiny", "ssmc-out/safetensors"], tasks=["piqa", "arc_easy"], limit=100, data="my-data")
report.write("eval.json")
report.rows()                   # one row per metric, for a table
"""

from __future__ import annotations

from typing import Any

from ssmc.runtime import lazy

_HOMES = lazy.homes(
    {
        "ssmc.runtime.evaluation.evaluate": "evaluate_models",
        "ssmc.runtime.evaluation.report": "EvalReport ModelResult Score TaskInfo check_output output_path",
        "ssmc.runtime.evaluation.settings": "EvalSettings",
        "ssmc.runtime.evaluation.statistics": "Difference",
    }
)
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.fetch(__name__, _HOMES, name)
