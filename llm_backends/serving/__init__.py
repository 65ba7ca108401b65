"""Models behind a server: OpenAI's API, vLLM, budgets, and checks of a server's capabilities."""
