"""One page before a queue slot is burnt: what each rank finds, compared over the ranks.

`facts.py` is what a rank can say alone, `disk.py` of the run folder and the shards, `links.py` what
takes all of them together; `judge.py` turns facts into lines that are `ok` or say what to do.
"""

from launch.doctor.examine import examine
from launch.doctor.judge import Line, page

__all__ = ["Line", "examine", "page"]
