"""Compare a plan with what people use today.

    candidates.py  what is compared                     trial.py   trains one, in a child process
    compare.py     plans, trains all, one after another  page.py    the results as a table and as a page

Nothing here is loaded before it is asked for.
"""

from __future__ import annotations
