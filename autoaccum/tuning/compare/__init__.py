"""Compare a plan with what people use without one.

candidates.py  what is compared               trial.py    train one candidate, in a child process
comparison.py  plan, then train all in turn   results.py  the results as a table and as JSON
"""
