"""From a name to a model that is computed rightly, and as fast as this machine can. It begins in `ready`."""
