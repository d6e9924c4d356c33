"""``serve``: engine → app → uvicorn, and what a server opens, says and takes up on its way."""
