"""Class centers in parts over the ranks: a margin softmax over millions of identities.

`centers.py` is the whole: `loss = centers(embeddings, labels)`, `centers.step(lr)`. `parts.py` says
who owns which classes, `sampling.py` which take part in a step, `head.py` what ranks tell each
other for the loss, `stream.py` is the two sweeps over tiles, `margins` the losses' formulas,
`optimizer.py` moves touched rows only (`rows.py` stores them, `catch_up.py` knows what an untouched
row missed), `neighbours.py` keeps lists of nearest centers, `identities.py` names rows,
`files.py` stores all of it by global row range.
"""

from trainer.centers.centers import ClassCenters

__all__ = ["ClassCenters"]
