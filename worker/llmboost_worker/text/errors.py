"""What can go wrong between text and tokens, told to whoever can mend it."""


class TextError(Exception):
    """Base of the errors of this package."""


class TokenizerError(TextError):
    """For the operator: the model's tokenizer can't be used; the message says why and what to do."""


class PromptError(TextError):
    """For the client: this prompt can't be turned into tokens.

    Attributes:
        message: What was wrong, with what value, and what to do.
        param: The field of the request that is to blame, such as `messages[2].content`.
        code: A word for programs, such as `empty_prompt`.
    """

    def __init__(self, message: str, param: str, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class PromptTooLong(PromptError):
    """The prompt is so far beyond the context that it isn't worth its encoding.

    Attributes:
        at_least: Tokens that it has, of perhaps many more.
    """

    def __init__(self, at_least: int, param: str) -> None:
        super().__init__(
            f"The {param} has more than {at_least} tokens.", param=param, code="context_length_exceeded"
        )
        self.at_least = at_least
