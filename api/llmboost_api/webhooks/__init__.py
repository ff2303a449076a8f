"""Webhooks: the operator's servers are told when background responses and batches end."""
