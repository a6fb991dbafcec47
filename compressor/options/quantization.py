"""The words in which quantisation is asked for. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence

W8, W4 = "w8", "w4"
BITS = {W8: 8, W4: 4}
GPTQ, RTN, AWQ = "gptq", "rtn", "awq"
MAPS = "maps"  # the linear maps of attention and MLP of a hybrid
MODULES = ("in_proj", "x_proj", "dt_proj", "out_proj", MAPS)
DEFAULT_MODULES = f"in_proj,x_proj,out_proj,{MAPS}"
GROUP, SMALLEST_GROUP = 128, 16
OPTIONS = ("quantize", "quantize_method", "group_size", "symmetric", "quantize_modules", "quantize_embedding")


def group_for(inputs: int, asked: int) -> int | None:
    """How many inputs share a scale: as many as asked for, or the largest half, quarter ... that divides them.

    Args:
        inputs: of the module.
        asked: a power of two.

    Returns:
        None where not even groups of 16 fit.
    """
    group = asked
    while inputs % group and group > SMALLEST_GROUP:
        group //= 2
    return None if inputs % group else group


def check_group(size: int) -> int:
    """A group size itself.

    Raises:
        ValueError: it is no power of two that formats know.
    """
    if size < SMALLEST_GROUP or size > 1024 or size & (size - 1):
        raise ValueError("it is a power of two from 16 to 1024, such as 128, 64 or 32")
    return size


def parse_modules(value: object) -> tuple[str, ...]:
    """Names of modules with commas between, or as a list, in the order they run.

    Raises:
        ValueError: there is no such module, or none.
    """
    listed = value.split(",") if isinstance(value, str) else value
    words = [str(word).strip() for word in listed] if isinstance(listed, Sequence) else []
    if not words or any(word not in MODULES for word in words):
        raise ValueError(f"it is some of {', '.join(MODULES)} with commas between")
    return tuple(name for name in MODULES if name in words)
