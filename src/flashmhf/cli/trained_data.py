"""The data that a model was trained on, for commands that are not told which to read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashmhf.cli.early_checks import check_data
from flashmhf.cli.terminal import say
from flashmhf.data.config import DataConfig, parse_sources
from flashmhf.errors import InputError
from flashmhf.files import read_json
from flashmhf.training.config import DIRECTORY, RUN_FILE

CHECKPOINT = "checkpoint-"  # begins the names of folders in a run's


def data_of(model: str, options: Mapping[str, Any]) -> DataConfig:
    """The data to read: the given one, or else the one in the record of the run, which a line then names.

    Args:
        model: the folder of a training run, or of one of its checkpoints.
        options: the command's "data", "text_column" and "bad_data", None where they are not given.

    Raises:
        InputError: no data is given, and the model does not say which it was trained on, or names several sources.
    """
    recorded = _recorded(Path(model))
    given = {name: options[name] for name in ("text_column", "bad_data") if options[name] is not None}
    if options["data"] is not None:
        check_data(options["data"])
        return replace(DataConfig(), source=options["data"], **given)
    if recorded is None:
        raise InputError(f"data: expected --data SOURCE, since {model} does not record what it was trained on")
    if len(parse_sources(recorded.source)) > 1:
        raise InputError(
            f"data: expected --data with one of the sources that {model} was trained on, {recorded.source}"
        )
    check_data(recorded.source)
    say(f"data: {recorded.source}, which the model was trained on")
    return replace(recorded, **given)


def _recorded(folder: Path) -> DataConfig | None:
    """What a run's record says; paths that are relative to where it was started are found from elsewhere, too."""
    file = (folder.parent if folder.name.startswith(CHECKPOINT) else folder) / RUN_FILE
    if not file.is_file():
        return None
    content = read_json(file)
    data = DataConfig.from_options(content)
    there = Path(str(content.get(DIRECTORY, ""))) / data.source
    return replace(data, source=str(there)) if there.exists() and not Path(data.source).exists() else data
