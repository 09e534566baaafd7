"""`--push-to-hub`: the finished model, uploaded once, after it is saved; refused before the run if that cannot work."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from flashmhf.errors import InputError, RunError, one_line_message

logger = logging.getLogger(__name__)

# Of a run's folder; not its checkpoints, log and record, which names paths of the machine.
UPLOADED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "README.md", "result.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*"),
)
NOT_UPLOADED = ("checkpoint-*", "runs/*", ".*")


def check_hub(arguments: Any) -> None:
    """Raises InputError if the model could not be uploaded at the end: no login, no network.

    Args:
        arguments: TrainingArguments.
    """
    if not arguments.push_to_hub or arguments.process_index != 0:
        return
    try:
        user = HfApi(token=arguments.hub_token).whoami()["name"]
    except Exception as error:  # the client raises a dozen unrelated types
        raise InputError(
            f"push-to-hub: expected a Hub that can be reached and a login (`hf auth login`, or --hub-token), got: "
            f"{one_line_message(error)[:200]}"
        ) from error
    logger.info("the finished model goes to %s on the Hub, as %s", repository(arguments), user)


def repository(arguments: Any) -> str:
    """The id to upload to: the given one, or the name of the run's folder, in the user's own namespace."""
    return arguments.hub_model_id or Path(arguments.output_dir).absolute().name


def push(arguments: Any) -> str:
    """Uploads the model in the run's folder; its address.

    Raises:
        RunError: the upload failed; the folder is complete.
    """
    api, folder = HfApi(token=arguments.hub_token), str(arguments.output_dir)
    try:
        created = api.create_repo(repository(arguments), private=arguments.hub_private_repo, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id,
            folder_path=folder,
            revision=arguments.hub_revision,
            allow_patterns=list(UPLOADED),
            ignore_patterns=list(NOT_UPLOADED),
            commit_message="Trained with FlashMHF",
        )
    except Exception as error:
        raise RunError(
            f"push-to-hub: the upload failed ({one_line_message(error)[:200]}); the model is complete in {folder}: "
            f"`hf upload {repository(arguments)} {folder}` uploads it"
        ) from error
    return str(created)
