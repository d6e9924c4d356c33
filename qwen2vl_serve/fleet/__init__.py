"""Many replicas of this server behind one address, on Ray Serve.

A gateway takes requests and has each answered by a replica: our application over one engine. What a
replica has cached decides which (``affinity``). ``ray`` is imported by ``application`` and
``router`` alone.
"""
