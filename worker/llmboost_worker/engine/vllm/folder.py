"""The temporary folder of an engine, and what vLLM's processes have to know of it."""

import os

from llmboost.temporary import TemporaryFolder
from llmboost_worker.engine.vllm import vocabulary

SOCKETS = "VLLM_RPC_BASE_PATH"
"""The environment variable with the folder of the sockets by which vLLM's processes talk to each other."""


class EngineFolder(TemporaryFolder):
    """Holds the socket for complaints, the vocabulary and vLLM's sockets.

    By itself vLLM puts those among the temporary files, under names that say nothing, and leaves them there
    even if it ends in good order.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self) -> None:
        super().__init__("llmboost-vllm-")
        os.environ[vocabulary.PATH] = str(self.path / "vocabulary")
        os.environ.setdefault(SOCKETS, str(self.path))

    def close(self) -> None:
        """Removes it and all that it holds."""
        super().close()
        if os.environ.get(SOCKETS) == str(self.path):  # and not one that the user has set
            del os.environ[SOCKETS]
