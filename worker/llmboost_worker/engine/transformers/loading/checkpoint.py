"""A checkpoint's files: found, read, or said what is wrong with them and what to do."""

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers.config import EngineConfig

logger = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "*.bin")
LFS = b"version https://git-lfs"
"""How a file begins that stands for one which Git hasn't fetched."""


def options_of(config: EngineConfig) -> dict[str, Any]:
    """What transformers is told whenever it reads from the checkpoint."""
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def read_config(config: EngineConfig) -> Any:
    """The model's configuration.

    Raises:
        EngineError: there is none, or it can't be used; says why.
    """
    _check_folder(config.model)
    try:
        return AutoConfig.from_pretrained(config.model, **options_of(config))
    except Exception as error:  # of transformers, of the hub's client, of a model's own code
        raise _not_found(config, error) from error


def unloaded(model: str, error: Exception) -> EngineError:
    """Why weights can't be loaded: by the files, if one of them isn't whole, for libraries don't name it."""
    why = _damage(Path(model).expanduser()) or str(error).partition("\n")[0]
    return EngineError(f"can't load the weights of {model!r}: {why}")


def check_report(model: str, report: dict[str, Any]) -> None:
    """Refuses a model whose weights don't come from the checkpoint, as by transformers' report of loading it:
    in their place it would serve random numbers. Weights that the model has no place for may be of a part
    that isn't served, such as one for images, or of layers that config.json forgets.

    Raises:
        EngineError
    """
    if missing := sorted(report["missing_keys"]):
        raise EngineError(
            f"the checkpoint {model!r} lacks {len(missing)} of the model's weights, {missing[0]!r} "
            "for one: is it complete, and of a causal language model?"
        )
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise EngineError(
            f"the checkpoint {model!r} has {name!r} in the shape {list(found)}, but its config.json asks for "
            f"{list(expected)}: are both of the same model?"
        )
    if unused := sorted(report["unexpected_keys"]):
        logger.warning(
            "%d weights of the checkpoint %r aren't used, %r for one: config.json has no place for them",
            len(unused),
            model,
            unused[0],
        )


def _check_folder(model: str) -> None:
    """Says what is wrong with a folder before transformers takes its path for a name on the hub."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise EngineError(f"there is no model folder {model!r} (looked for {folder.absolute()})")
        return
    if not (folder / "config.json").is_file():
        raise EngineError(
            f"the folder {model!r} has no config.json: a model in Hugging Face's layout needs config.json, "
            "tokenizer files and *.safetensors"
        )
    if not _weights(folder):
        raise EngineError(f"the folder {model!r} has no weights (looked for {', '.join(WEIGHTS)})")


def _not_found(config: EngineConfig, error: Exception) -> EngineError:
    if os.path.isdir(config.model):
        return EngineError(f"can't use config.json of {config.model!r}: {error}")
    revision = f" at revision {config.revision!r}" if config.revision else ""
    return EngineError(
        f"found no model {config.model!r}{revision}: there is no folder of that name here, and the Hugging "
        f"Face hub didn't give it. Check the name, the network, and HF_TOKEN if the model is gated. ({error})"
    )


def _weights(folder: Path) -> list[Path]:
    return sorted(path for pattern in WEIGHTS for path in folder.glob(pattern) if path.is_file())


def _damage(folder: Path) -> str | None:
    """What is wrong with the first file of weights that isn't whole."""
    for path in _weights(folder):
        with path.open("rb") as file:
            if file.read(len(LFS)) == LFS:
                return f"{path.name} is a pointer of Git LFS, not the file itself: run `git lfs pull`"
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError as error:
                return f"{path.name} is damaged or not complete ({error}): fetch it again"
        elif not zipfile.is_zipfile(path):
            return f"{path.name} is damaged, or no file of torch's: fetch it again"
    return None
