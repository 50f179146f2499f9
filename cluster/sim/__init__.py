"""A whole cluster in one thread under virtual time: the real deciders in simulated processes, with seeded faults.

`scenario` is what is to happen, `run` makes it happen, `checks` says what must hold after every event. Nothing
here reads a clock or draws chance but from the world's seed: the same scenario is the same story, event by event.
"""
