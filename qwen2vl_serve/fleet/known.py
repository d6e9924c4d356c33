"""The replicas that the router of this process may ask; one fleet a process.

A module of its own: Ray sends the router's class by value, so that its own attributes are another
class's than those that the gateway imports.
"""

from __future__ import annotations

from collections.abc import Sequence

replicas: Sequence[str] = ()
