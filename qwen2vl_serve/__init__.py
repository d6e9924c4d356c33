"""OpenAI-compatible serving of the Qwen2-VL family on vLLM.

A request's way::

    http/       the wire, the door, the body         launch/    engine, app, uvicorn: ``serve``
    auth/       whose it is, what that key may use
    protocol/   from bytes to a ``ChatRequest``      app.py     middleware, and where routes lead
    admission   at once, later, or not               api.py     the routes of chat, step by step
    media/      fetch, check, decode                 uploads, batches/, adapters/: other routes
    context/    does it fit, and if not
    engine.py   what is asked of an engine
    engines/    one of several
    vllm_engine/  the seam: all that knows vLLM

Before a start: ``profile/`` says what is wanted, ``machine/`` and ``checkpoints/`` what there is,
``plan/`` and ``doctor/`` whether that goes together (``preflight`` stops what cannot start),
``download/`` brings what is missing, and ``boot/`` tells the start. Around it: ``fleet/`` (many
replicas), ``demo/`` (the model that ships), ``cli/``. Below all: ``errors``, ``vision``, ``line``.
"""

__version__ = "0.1.0"
