"""Command that checks an LLM server: capabilities, speed and settings."""
