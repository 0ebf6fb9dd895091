"""What a model is worth: `evaluate(model, batches, ...)` in `evaluate.py` gives plain numbers.

`towers.py` turns an evaluation set into embeddings, `nearest.py` finds the k most similar rows over
all ranks, `retrieval.py`, `zero_shot.py` count hits, `classes.py` reads class names and prompts.
Every sample counts exactly once, and every number is the same at any world size. Losses and their
gradients are in `trainer/losses`; a new task is one function and one line in `evaluate.TASKS`.
"""
