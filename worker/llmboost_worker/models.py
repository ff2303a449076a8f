"""Where a model's files are, from the name that the user gives."""

from pathlib import Path

from llmboost.settings import DEMO_MODEL

DEMO_FOLDER = Path(__file__).parent / "demo_model"


def locate(model: str) -> str:
    """What transformers takes for a model's name: its folder, or its name on the hub."""
    return str(DEMO_FOLDER) if model == DEMO_MODEL else model
