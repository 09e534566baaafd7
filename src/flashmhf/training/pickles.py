"""What a checkpoint's pickles would call if they were loaded, found without loading them."""

from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers.trainer_pt_utils import safe_globals

SUFFIXES = {".pt", ".pth", ".bin", ".pkl", ".pickle"}


def unsafe_reason(folder: Path) -> str | None:
    """The first file below `folder` with more than tensors and plain values, and what it would call, or None.

    `torch.load(weights_only=True)`, which the Trainer uses, refuses the same files, but halfway through loading.
    """
    for file in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
        name = file.relative_to(folder).as_posix()
        try:
            with safe_globals():  # numpy arrays, in the state of its random generator
                calls = get_unsafe_globals_in_checkpoint(file)
        except Exception as error:  # a file made for this can have torch's parser raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            return f"{name} is not what torch.save writes ({reason}); it was not loaded"
        if calls:
            return f"{name} is a pickle that calls {', '.join(sorted(calls)[:3])}; it was not loaded"
    return None
