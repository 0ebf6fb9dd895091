"""The similarity engine: everything a loss asks of `S = A @ B.T` without ever storing `S`.

`pairs.py` streams tiles of `S` and turns pair weights `dL/dS` into gradients; `visiting.py` brings
the other ranks' rows by, gathered or round a ring; `statistics.py` and `softmax.py` reduce tiles
over rows and columns; `exclusion.py` takes out pairs that are not negatives; `closed_form.py` hands
finished gradients to autograd. A loss (`trainer/losses`) is a loop over tiles, a value, a weight.
"""
