"""Python's cyclic collector, in a process that has started and now serves."""

import gc

YOUNG = 10_000
"""Objects more than before at which it looks for cycles among the young ones. By default 700, which a step of
many streams makes."""


def settle() -> None:
    """What is there now stays for good, so it is not looked at again: modules, routes, a model's. To look at
    them took a tenth of a pod's time, and in a worker stops the engine."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
