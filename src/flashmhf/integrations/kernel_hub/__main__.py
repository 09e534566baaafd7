"""`python -m flashmhf.integrations.kernel_hub OUT`: writes a kernel for the Kernel Hub."""

import argparse
import sys
from pathlib import Path

from flashmhf.errors import InputError
from flashmhf.integrations.kernel_hub.build import DEVICES, write_kernel


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flashmhf.integrations.kernel_hub", description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder")
    parser.add_argument("--repo-id", default="flashmhf/flashmhf", help="Hub repository to upload to (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        write_kernel(options.out, repo_id=options.repo_id)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(f"{options.out}: builds for {', '.join(DEVICES)}; try kernels.get_local_kernel(Path({str(options.out)!r}))")
    return 0


if __name__ == "__main__":
    sys.exit(main())
