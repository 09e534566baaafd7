"""Datasets on the Hub as rows."""

import logging
from pathlib import Path

import datasets
import pyarrow
from datasets import Dataset, IterableDataset

from flashmhf.data.cache import cached
from flashmhf.data.corrupt_records import naming, reason
from flashmhf.data.files import ROW, missing_column, scalar_row
from flashmhf.data.fingerprints import short_hash
from flashmhf.data.workers import MAX_ROWS
from flashmhf.errors import InputError
from flashmhf.names import check_exists

logger = logging.getLogger(__name__)


def hub_splits(source: str, streaming: bool) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Every split of a dataset on the Hub, `owner/name` or `owner/name:subset`; of a stream, nothing is read yet.

    Raises:
        InputError: there is none; a path is never looked for on the Hub.
    """
    check_exists("data", source)
    name, _, subset = source.partition(":")
    try:
        try:
            return datasets.load_dataset(name, subset or None, streaming=streaming)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and type(error) is not OSError:  # as the Hub client's are
                raise
            # Its files in the cache are damaged: they are made from the download again.
            logger.warning("data: %s is read into the cache again: %s", source, reason(error))
            again = datasets.DownloadMode.REUSE_CACHE_IF_EXISTS
            return datasets.load_dataset(name, subset or None, streaming=streaming, download_mode=again)
    except Exception as error:  # the Hub client raises a dozen unrelated types
        why = reason(error)
        if error.__cause__ is not None:
            why += f" ({reason(error.__cause__)})"
        if "scripts are no longer supported" in why:
            why += "; use a copy in parquet"
        raise InputError(
            f"data: expected stdlib, a file, a folder or a dataset on the Hub, got {source!r} ({why})"
        ) from error


def hub_rows(documents: Dataset | IterableDataset, where: str, text_column: str) -> Dataset | IterableDataset:
    """A dataset's text column as rows of `read_rows`."""
    columns = documents.column_names
    if columns is None:  # a stream that does not know its columns until it is read
        with naming(where):
            columns = list(next(iter(documents), {}))
    if text_column not in columns:
        raise InputError(missing_column(columns, where, text_column))

    def rows(batch: pyarrow.Table, indices: list[int]) -> pyarrow.Table:
        made = [
            scalar_row(value, f"{where}, row {index + 1}")
            for index, value in zip(indices, batch[text_column], strict=True)
        ]
        return pyarrow.Table.from_pylist(made, ROW.arrow_schema)

    options = {"batched": True, "batch_size": MAX_ROWS, "with_indices": True, "features": ROW}
    in_arrow = documents.with_format("arrow")
    if isinstance(in_arrow, IterableDataset):
        return in_arrow.map(rows, **options).with_format(None)

    def build(folder: Path) -> Dataset:
        made = in_arrow.map(rows, cache_file_name=str(folder / "rows.arrow"), load_from_cache_file=False, **options)
        return made.with_format(None)

    with naming(where):
        return cached(short_hash("rows", documents._fingerprint, where, text_column, list(ROW)), build)
