"""What this machine has: cards and their driver, processors, memory."""
