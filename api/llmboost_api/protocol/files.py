"""POST and GET /v1/files: what a client says of a file, and of a list of files."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from llmboost_api.protocol.request import RequestModel

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
"""What a client may give; the batch runner makes others."""

HOUR_S, MONTH_S = 3600, 30 * 24 * 3600


class ExpiresAfter(RequestModel):
    """When a file is to go by itself."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=HOUR_S, le=MONTH_S)]


class FileRequest(RequestModel):
    """The fields of a form beside the file itself."""

    purpose: Purpose
    expires_after: ExpiresAfter | None = None

    def life_s(self) -> int | None:
        """After how many seconds it goes, if it does by itself: those of batches do, as OpenAI's."""
        if self.expires_after is not None:
            return self.expires_after.seconds
        return MONTH_S if self.purpose == "batch" else None


FORM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(get_args(Purpose))},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": HOUR_S, "maximum": MONTH_S},
    },
    "required": ["file", "purpose"],
}
"""JSON schema of the form as it is sent."""
