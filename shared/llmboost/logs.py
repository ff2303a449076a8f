"""Logging of a process: one line per event on standard error, with the request id where there is one."""

import logging

from llmboost.settings import LogLevel


def configure(level: LogLevel) -> None:
    """Sets up the root logger; libraries speak from warning on."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    for name in ("llmboost", "llmboost_api", "llmboost_worker"):
        logging.getLogger(name).setLevel(level.upper())
