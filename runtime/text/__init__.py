"""Text for calibration and for perplexity: from files, folders, pipes, data sets known by name, or the embedded sample.

What a file holds is read from its content, not from its name: JSON lines are JSON lines under any name, compressed text
is decompressed, and what is not text is refused by what it is.
"""

from ssmc.runtime.text.datasets import NAMED_DATASETS
from ssmc.runtime.text.files import SUFFIXES
from ssmc.runtime.text.reading import Texts, read_texts, tokenize
from ssmc.runtime.text.windows import Drawn, draw_windows

__all__ = ["NAMED_DATASETS", "SUFFIXES", "Drawn", "Texts", "draw_windows", "read_texts", "tokenize"]
