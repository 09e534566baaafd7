"""Fits loss = E + A parameters^-alpha to runs of several sizes, and extrapolates the contenders' difference to 370M.

    python benchmarks/scaling_fit.py OUTPUT RUNS...

RUNS are files of benchmarks/gpu.py (*.jsonl) or folders of `flashmhf compare`, see recipes/scaling.sh. Writes
OUTPUT.md, OUTPUT.json and OUTPUT.png. Parameters are those without embeddings. With fewer than four sizes E is 0, a
pure power law. A verdict requires three seeds. What the intervals are: scaling_law.py.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from flashmhf.errors import InputError
from flashmhf.files import atomic_write, write_json
from flashmhf.reports.render import png
from scaling_law import fit
from scaling_report import markdown, picture
from scaling_runs import paired, read_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    try:
        found = fit(paired(run for source in arguments.runs for run in read_runs(source)))
    except InputError as error:
        parser.error(str(error))
    output: Path = arguments.output
    write_json(output.with_name(output.name + ".json"), json.loads(json.dumps(asdict(found))))
    atomic_write(output.with_name(output.name + ".md"), markdown(found))
    atomic_write(output.with_name(output.name + ".png"), png(picture(found)))
    print(markdown(found))


if __name__ == "__main__":
    main()
