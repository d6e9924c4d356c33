"""Install this project into ``.venv``: what ``make serve`` and ``make test`` do first.

``machine`` decides, ``steps`` runs pip and explains its failures, ``state`` remembers,
``__main__`` is the order of events. Standard library only, and syntax that Python 3.6 reads,
so that an interpreter that is too old can still find a newer one or say what is missing.
"""
