"""`python -m autoaccum`."""

from .cli import main

main()
