"""The token MDP: the state is a prompt and what was written so far, an action is a token."""
