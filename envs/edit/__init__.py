"""The edit MDP: the state is a text, an action is an edit."""
