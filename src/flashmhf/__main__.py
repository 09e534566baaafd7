import sys

from flashmhf.extras import MissingLibraryError


def main() -> None:
    """The command `flashmhf`; says in one line which extra of the package it lacks."""
    try:
        from flashmhf import cli

        cli.main()
    except MissingLibraryError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
