"""The matrix of hostile input: classes A to L, each a module of cases against any server.

``python -m tests.hostile --help`` runs it against a server that is up, or starts servers for it.
"""
