"""Engines: token ids in, token ids out. Nothing here knows of Redis, HTTP or text."""
