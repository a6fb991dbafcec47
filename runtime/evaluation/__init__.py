"""Perplexity and lm-eval's tasks of several models side by side, each with its difference to the first one.

report = evaluate_models(["tiny", "ssmc-out/safetensors"], tasks=["piqa", "arc_easy"], limit=100, data="my-data")
report.write("eval.json")
report.rows()                   # one row per metric, for a table
"""

from ssmc.runtime.evaluation.evaluate import evaluate_models
from ssmc.runtime.evaluation.report import EvalReport, ModelResult, Score, TaskInfo, check_output, output_path
from ssmc.runtime.evaluation.settings import EvalSettings
from ssmc.runtime.evaluation.statistics import Difference

__all__ = [
    "Difference",
    "EvalReport",
    "EvalSettings",
    "ModelResult",
    "Score",
    "TaskInfo",
    "check_output",
    "evaluate_models",
    "output_path",
]
