"""What an LLM server can do, and what to set."""
