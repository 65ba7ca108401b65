"""The quality of an instruction with its instance: a linear rule over scorers."""
