"""What a model is worth: `evaluate(model, batches, tokenizer, config.eval, ranks)` -> numbers.

`tasks.py` has the tasks on texts, `image_tasks.py` those on images alone; `towers.py` turns an
evaluation set into embeddings. Each protocol is a file: `retrieval.py`, `zero_shot.py`,
`recall.py` (leave-one-out), `verification.py` (pairs), `ijb.py` (templates), `identification.py`
(1:N), `all_pairs.py`. They share `nearest.py` (the k most similar rows over all ranks), `fetch.py`
(rows by id from any rank), `roc.py` (exact shares at exact rates) and what reads tables:
`tables.py`, `ijb_tables.py`, `lookup.py`, `classes.py`. `cosines.py` has the report's histograms.
`xmc.py` is the task of texts against labels, which `trainer/validate_labels.py` calls, of the parts
`xmc_metrics.py`, `xmc_search.py` (exact), `xmc_hnsw.py` (approximate) and `xmc_file.py`. Every
sample counts once and the same embeddings give the same numbers on any number of ranks. A new task
is one function of a `Subject`, one line in `TASKS` and its name in `EvalConfig.tasks`.
"""

from trainer.evaluate.tasks import IMAGE_TASKS, TASKS, TEXT_TASKS, evaluate

__all__ = ["IMAGE_TASKS", "TASKS", "TEXT_TASKS", "evaluate"]
