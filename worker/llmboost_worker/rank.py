"""A process of a model that is split over several: `python -m llmboost_worker.rank`, as the engine of rank 0
starts it, with its place in the environment and the engine's configuration on standard input."""

import json
import logging
import os
import sys

from llmboost_worker.engine.transformers import EngineConfig
from llmboost_worker.engine.transformers.followers import follow
from llmboost_worker.engine.transformers.ranks import Place

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)  # what there is to tell, rank 0 tells
    place = Place.given()
    assert place is not None, "its place is given in the environment"
    status = follow(EngineConfig(**json.load(sys.stdin)), place)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # Python's own end takes torch apart piece by piece
