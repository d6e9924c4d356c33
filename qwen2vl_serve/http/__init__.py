"""HTTP around every route: the wire, the door, bodies, connections, errors, logs and traces."""
