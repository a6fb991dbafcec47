"""Models for consumers that are run by hand: of every hybrid family one, dense and pruned, with its export.

    python -m consumers.by_hand.prepare FOLDER

Their heads of attention are as wide as vLLM wants them on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from consumers.artefacts import WIDE, exported, models, prune


def main(arguments: Sequence[str] | None = None) -> None:
    """Write FAMILY/model, which is dense, FAMILY/0, masked, and FAMILY/0/safetensors, and print what is where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(arguments)
    for name, source in models(args.folder, WIDE, WIDE).items():
        place = args.folder / name.split(",")[0]
        for cut, masked in prune(name, source, place):
            export = exported(masked, cut, "safetensors", {}, True, Path(masked))
            print(f"{name}, {cut}: {masked}, to be read from {export}")


if __name__ == "__main__":
    main()
