"""What a model is worth: `evaluate(model, batches, tokenizer, config.eval, ranks)` -> numbers.

`tasks.py` has the tasks; `towers.py` turns an evaluation set into embeddings; `nearest.py` finds
the k most similar rows over all ranks; `retrieval.py` and `zero_shot.py` count hits; `classes.py`
reads class names and makes prompts; `cosines.py` has the report's histograms. Every sample counts
once and the same embeddings give the same numbers on any number of ranks. A new task is one
function and one line in `TASKS`.
"""

from trainer.evaluate.tasks import TASKS, evaluate

__all__ = ["TASKS", "evaluate"]
