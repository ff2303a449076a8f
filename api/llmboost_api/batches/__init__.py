"""Batches: files of requests, answered line by line into other files, by whichever pod is there."""
