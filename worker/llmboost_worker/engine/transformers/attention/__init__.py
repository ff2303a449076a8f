"""Attention over blocks: where a step's rows belong (`layout`), what computes it (`backend`, `backends`), and
how a model comes to call it (`hook`)."""
