"""Holds the token MDP: the state is a prompt and the response so far, an action appends a token."""
