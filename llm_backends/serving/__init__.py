"""Models behind a server: OpenAI's API, vLLM, budgets, and what a server can do."""
