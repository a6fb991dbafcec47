"""Recipes: a compression run as a YAML file. Every run writes the one that repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ssmc.compressor.options.config import CompressConfig
from ssmc.runtime.errors import UsageError

RECIPE = "recipe.yaml"


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The options a recipe names; `configure` validates them like those of the command line.

    Raises:
        UsageError: it cannot be read or is not a YAML mapping of options.
    """
    path = Path(path).expanduser()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(
            f"The recipe {path} cannot be read: {reason}. Name the recipe.yaml of an earlier run."
        ) from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        place = f" (line {where.line + 1})" if where else ""
        raise UsageError(f"The recipe {path} is not YAML{place}. Write one `option: value` a line.") from error
    except RecursionError as error:
        raise UsageError(f"The recipe {path} is nested too deeply. Write one `option: value` a line.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(
            f"The recipe {path} does not name options. Write one `option: value` a line, as sparsity: 0.5."
        )
    return content


def write_recipe(folder: Path, config: CompressConfig) -> Path:
    """Write the recipe of a run; options left at their defaults are written too, since defaults may change."""
    path = folder / RECIPE
    options = config.model_dump(mode="json", exclude={"device"})
    header = f"# ssmc compress --recipe {RECIPE}\n"
    path.write_text(header + yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path
