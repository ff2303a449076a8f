"""Responses on their way: created, followed in a conversation, retrieved and listed."""
