"""Files that clients upload and batches write: bytes in a storage, records in Redis."""
