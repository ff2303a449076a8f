"""The worker process: claims jobs, runs them through an engine, appends tokens to their streams."""
