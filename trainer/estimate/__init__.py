"""What a run will need before it is started: memory by term, bytes on the wire, time, disk.

Arithmetic only: no shard is read, no process group made. `meter.py` counts what the towers keep for
their backward pass, without computing it; `state.py` knows what DeepSpeed holds at each ZeRO stage;
`rows.py` centers, label rows and the loss; `wire.py` collectives; `clock.py` time and cost;
`estimate.py` puts them together and says whether they fit. Figures are held against measured runs
by `python -m benchmarks.estimate`.
"""

from trainer.estimate.estimate import Estimate, estimate
from trainer.estimate.plan import Plan, plan_run

__all__ = ["Estimate", "Plan", "estimate", "plan_run"]
