"""The start of the engine as its log tells it, and as the planner foresees it."""
