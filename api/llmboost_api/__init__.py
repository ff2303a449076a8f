"""The API pod: HTTP in, token streams out. Knows text, never tokens; loads neither torch nor a model."""
