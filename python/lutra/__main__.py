"""``python -m lutra`` is the ``lutra`` command."""

from .cli import main

main()
