"""Who may use the server and how much: keys, where they rest, and what is counted for each."""
